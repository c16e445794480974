"""Asks an OpenAI-compatible endpoint for one answer, and says why where there is none.

The client is that of `openai` (extra `[collect]`). Its own retries are off: the loop in `collect`
sees every failure, and the ledger counts it. A reply is read field by field, because servers differ
and some send what the client's types do not allow.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import time
from typing import TYPE_CHECKING, Any

from compact.teachers.spec import SHORTEST_KEY, Teacher
from compact.teachers.store import Answer

if TYPE_CHECKING:
    import openai

_FATAL = {401: "unauthorised", 402: "no credit", 404: "no such address or model"}
_AGAIN = (408, 409, 425, 429)
_BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "canceled")
"""A finish_reason of an answer that the server did not end: vLLM's, SGLang's, OpenRouter's."""
_CONNECT = 10.0
"""Most seconds for a connection."""
_CUT = ("model_length", "max_tokens")
"""Other names of the finish_reason `length`, in lower case: Mistral's, Anthropic's, Google's."""
_QUOTA = "insufficient_quota"
_TOO_MANY = 1 << 31
"""Tokens that no reply has: a larger count is not believed."""
HIDDEN = "[key]"
"""Stands for the key wherever an endpoint sends it back."""


class Failure(Exception):
    """A request without an answer.

    Attributes:
        kind: a short name for the ledger, such as `rate limit` or `timeout`.
        again: whether to send the request again.
        fatal: whether no request to this endpoint can succeed.
        busy: whether the endpoint wants fewer requests.
        wait: seconds that the endpoint asks to wait, None if it names none.
        billed: whether the endpoint may charge for it.
        usage: tokens of the prompt and of the answer, as the endpoint reports them.
        answer: what is kept once the request is not sent again, or None.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        again: bool = True,
        fatal: bool = False,
        busy: bool = False,
        wait: float | None = None,
        billed: bool = False,
        usage: tuple[int, int] = (0, 0),
        answer: Answer | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.again, self.fatal, self.busy = kind, again, fatal, busy
        self.wait, self.billed, self.usage, self.answer = wait, billed, usage, answer


class Endpoint:
    """An endpoint of one teacher. The key is in memory only."""

    def __init__(self, teacher: Teacher) -> None:
        """Makes the client; sends nothing.

        Raises:
            ImportError: `openai` is not installed.
            ValueError: the key's variable is not set.
        """
        try:
            import openai
        except ImportError:
            raise ImportError(
                f"teacher {teacher.name!r} has a base_url, which needs the package openai: "
                "pip install openai, or COMPACT with the extra [collect]"
            ) from None
        self._openai = openai
        self._key = teacher.key()
        self.timeout = teacher.timeout
        self._client: openai.AsyncOpenAI = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=teacher.base_url,
            timeout=openai.Timeout(teacher.timeout, connect=min(_CONNECT, teacher.timeout)),
            max_retries=0,
        )

    async def ask(self, request: dict[str, Any], sample: int) -> Answer:
        """Sends a request once.

        Args:
            request: model, messages and sampling parameters, as in `Teacher.parameters`.
            sample: the number of the sample; an endpoint draws each sample anew.

        Raises:
            Failure: there is no answer.
        """
        openai = self._openai
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            # The client's own time limit is one for each read: a slow trickle would never end.
            raw = await asyncio.wait_for(create(**request), self.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise self._late() from None
        except openai.APIStatusError as error:
            wait = retry_after(error.response.headers)
            raise self._refused(error.status_code, error.message, error.code, wait) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            sent = not type(cause).__name__.startswith("Connect")  # then it may be charged
            if sent and isinstance(error, openai.APITimeoutError):
                raise self._late() from None
            words = self._hide(f"{type(cause).__name__}: {cause}")
            raise Failure("connection", words, busy=True, billed=sent) from None
        return self._answer(raw.http_response.content)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    def _late(self) -> Failure:
        words = f"no answer within the timeout of {self.timeout:g} s"
        return Failure("timeout", words, busy=True, billed=True)

    def _refused(
        self, status: int, message: object, code: object, wait: float | None = None
    ) -> Failure:
        """Returns the failure of a reply with an error status."""
        words = self._hide(f"status {status}: {message}")
        if status == 429 and code == _QUOTA:
            return Failure("no credit", words, again=False, fatal=True)
        if status in _FATAL:
            return Failure(_FATAL[status], words, again=False, fatal=True)
        if status in _AGAIN or status >= 500:
            kind = "rate limit" if status == 429 else "server error"
            return Failure(kind, words, busy=True, wait=wait)
        return Failure("refused", words, again=False)

    def _answer(self, content: bytes) -> Answer:
        """Reads the body of a reply.

        Raises:
            Failure: it is an error, is not JSON, has no choice, or the answer is empty or broken
                off.
        """
        try:
            body = json.loads(content)
            refused = _error(body)
            if refused is not None:
                raise self._refused(*refused)
            usage = _usage(body)
            choice = body["choices"][0]
            message = choice["message"]
            text, thought = _parts(message.get("content") or "")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or thought
            finish = str(choice.get("finish_reason") or "stop")
            finish = "length" if finish.lower() in _CUT else finish
            if not text.strip() and message.get("refusal"):  # withheld, as by a filter
                finish = "content_filter"
            model = str(body.get("model") or "")
            (text + reasoning + finish + model).encode("utf-8")  # no half of a surrogate pair
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            words = self._hide(f"{type(error).__name__}: {error}; {content[:80]!r}")
            raise Failure("broken reply", words, billed=True) from None
        answer = Answer(self._hide(text), self._hide(reasoning), finish, self._hide(model), *usage)
        unknown = usage == (0, 0)
        if finish in _BROKEN_OFF:
            words = f"finish_reason {finish!r}"
            raise Failure("broken off", words, busy=True, billed=unknown, usage=usage)
        if not text.strip() and finish not in ("length", "content_filter"):
            words = "an empty answer"
            raise Failure("empty", words, billed=unknown, usage=usage, answer=answer)
        return answer

    def _hide(self, text: str) -> str:
        # A short one is the stand-in of a local server, and may be a word of the answer.
        key = self._key or ""
        return text.replace(key, HIDDEN) if len(key) >= SHORTEST_KEY else text


def _error(body: Any) -> tuple[int, object, object] | None:
    """Returns status, message and code of an error that came with status 200, as OpenRouter's do.

    An error without a known status counts as the server's. None if the reply is no error.
    """
    error = body.get("error")
    if not error or body.get("choices"):
        return None
    if not isinstance(error, dict):
        return 500, error, None
    code = error.get("code")
    status = int(str(code)) if str(code).isdigit() else 0
    if not 400 <= status < 600:
        status = 429 if code in (_QUOTA, "rate_limit_exceeded") else 500
    return status, error.get("message"), code


def _parts(content: str | list[Any]) -> tuple[str, str]:
    """Returns text and reasoning of a message's content, which some servers send in parts.

    Raises:
        TypeError, LookupError: it is neither.
    """
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise TypeError(f"content is {type(content).__name__}")
    text = [part["text"] for part in content if part["type"] == "text"]
    thought = [part["thinking"] for part in content if part["type"] == "thinking"]
    return "".join(text), "".join(_parts(each)[0] for each in thought)


def _usage(body: Any) -> tuple[int, int]:
    """Returns the tokens of prompt and answer; 0 where the reply does not report them."""
    usage = body.get("usage") or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    prompt, completion = (c if isinstance(c, int) and 0 < c < _TOO_MANY else 0 for c in counts)
    return prompt, completion


def retry_after(headers: Any) -> float | None:
    """Returns the seconds that a reply asks to wait, None if it does not say."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
