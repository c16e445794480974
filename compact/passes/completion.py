"""The tokens of a completion: after the generation prompt, as the chat template writes it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from compact.data.problems import REASONING
from compact.student.chat import render, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compact.data import Message, Text

# Stand for the texts of the last message, to find where the chat template puts them.
_CONTENT, _REASONING = "compactcontent", "compactreasoning"
_OPENING = re.compile(r"<(think(?:ing)?)>\s*\Z")
_THOUGHT = re.compile(r"\s*<(think(?:ing)?)>(.*?)</\1>", re.DOTALL)


class _Turn(NamedTuple):
    """What is written after the generation prompt, and the completion's text, at `start` in it."""

    written: str
    text: str
    start: int


def encode_completion(
    prompt: Text, completion: Text, processing_class: PreTrainedTokenizerBase, keep_tail: bool
) -> tuple[str, list[int], list[int]]:
    """Returns text, token ids (end of turn included) and character ends of a completion.

    Args:
        prompt: the prompt.
        completion: the completion.
        processing_class: a fast tokenizer.
        keep_tail: whether to keep the tokens after the end of turn.

    Raises:
        ValueError: the chat template refuses the messages, or changes prompt or completion; or
            without a template there are several messages.
    """
    if processing_class.chat_template is None:
        text = plain_text(completion, "completion")
        ids, ends = tokenise(text, processing_class)
        if processing_class.eos_token_id is not None:
            ids.append(processing_class.eos_token_id)
            ends.append(len(text) + 1)
        return text, ids, ends
    written, text, start = _turn(
        messages_of(prompt, "user"), messages_of(completion, "assistant"), processing_class
    )
    ids, ends = tokenise(written, processing_class)
    ends = [end - start for end in ends]
    if keep_tail:
        return text, ids, ends
    # Drop the tokens after the end of turn (a newline in many templates): not trained on.
    special = special_ids(processing_class)
    for i, token in enumerate(ids):
        if ends[i] > len(text) and token in special:
            return text, ids[: i + 1], ends[: i + 1]
    return text, ids, ends


def _turn(
    messages: list[Message], answer: list[Message], processing_class: PreTrainedTokenizerBase
) -> _Turn:
    """Renders an answer after the generation prompt.

    The last message is found by a rendering in which other words stand for its texts. A search for
    its texts may find the same words in an earlier message or in the end of turn.

    Raises:
        ValueError: the template refuses the messages, or changes the prompt or the answer.
    """
    before = render(messages, processing_class, generation_prompt=True)
    full = render([*messages, *answer], processing_class, generation_prompt=False)
    last = answer[-1]
    content, reasoning = last["content"], last.get(REASONING, "").strip()
    marked = {**last, "content": _CONTENT} | ({REASONING: _REASONING} if reasoning else {})
    frame = render([*messages, *answer[:-1], marked], processing_class, generation_prompt=False)
    head, kept, tail = frame.rpartition(_CONTENT)
    if kept and not head.startswith(before):
        opening = _OPENING.search(before)
        if opening and len(answer) == 1 and head.rstrip() == before[: opening.start()].rstrip():
            return _in_thought(content, reasoning, opening[1], tail)
        raise ValueError(
            "the chat template must put the completion after the generation prompt "
            f"{before[-40:]!r}, got {head[: len(before)][-40:]!r}; edit chat_template in a copy of "
            "the student's folder so that it writes both alike"
        )
    between = ""
    if reasoning and kept:
        head, kept, between = head.rpartition(_REASONING)
    written, start = full[len(before) :], len(head) - len(before)
    if kept and full.startswith(head) and full.endswith(tail):
        body = full[len(head) : len(full) - len(tail)]
        if not reasoning and body == content:
            return _Turn(written, content, start)
        text = body.strip()
        inner = text.removeprefix(reasoning).removesuffix(content.strip())
        if inner.strip() == between.strip() and len(text) == len(
            reasoning + inner + content.strip()
        ):
            return _Turn(written, text, start + len(body) - len(body.lstrip()))
    if reasoning:
        raise ValueError(
            f"the chat template must keep {REASONING}, got {written[:80]!r}; write the reasoning "
            "into content as plain text"
        )
    thought = _THOUGHT.match(content)
    if thought is not None:  # Qwen3's template changes the white space around it
        apart: Message = {"role": last["role"], "content": content[thought.end() :]}
        if thought[2].strip():
            apart[REASONING] = thought[2]
        with suppress(ValueError):
            return _turn(messages, [*answer[:-1], apart], processing_class)
    raise ValueError(
        f"the chat template must keep the completion, expected {content.strip()[:40]!r}, got "
        f"{written[:80]!r}"
    )


def _in_thought(content: str, reasoning: str, name: str, tail: str) -> _Turn:
    """Returns an answer after a generation prompt that opens a thought, as `<think>`.

    Such templates (DeepSeek-R1's) write no thought into earlier answers, so the answer is written
    here.

    Args:
        content: the text of the message. A tag that opens the thought again is dropped.
        reasoning: its reasoning, or an empty text.
        name: the name of the open tag.
        tail: the end of turn.
    """
    text = content.strip().removeprefix(f"<{name}>").lstrip()
    if reasoning:
        text = f"{reasoning}\n</{name}>\n\n{text}"
    return _Turn(text + tail, text, 0)


def tokenise(text: str, processing_class: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns token ids and the character at which each token ends."""
    encoded = processing_class(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def messages_of(content: Text, role: str) -> list[Message]:
    """Returns chat messages; a text becomes one of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def plain_text(content: Text, what: str) -> str:
    """Returns a prompt or completion as one text, for a tokenizer without a chat template.

    Raises:
        ValueError: there are several messages, or reasoning apart from the content.
    """
    if isinstance(content, str):
        return content
    if any(REASONING in message for message in content):
        raise ValueError(
            f"{what} holds {REASONING}, but the tokenizer has no chat template; set one, or write "
            "the reasoning into content"
        )
    if len(content) == 1:
        return content[0]["content"]
    raise ValueError(
        f"{what} holds {len(content)} chat messages, but the tokenizer has no chat template"
    )
