"""Writes messages with a tokenizer's chat template, and finds the token that ends an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from jinja2 import TemplateError

logger = logging.getLogger(__name__)

_ANSWER = "compactanswer"  # the text of a message whose end is looked for


def render(
    messages: Sequence[Mapping[str, str]], processing_class: Any, *, generation_prompt: bool
) -> str:
    """Returns messages as the chat template writes them.

    Args:
        messages: the messages.
        processing_class: a tokenizer with a chat template.
        generation_prompt: whether the beginning of the next answer follows them.

    Raises:
        ValueError: the template refuses the messages.
    """
    if "strftime_now" in str(processing_class.chat_template):
        _tell_of_date()
    try:
        text = processing_class.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    return str(text)


@cache
def _tell_of_date() -> None:
    logger.warning(
        "the chat template writes today's date (strftime_now): a run that is resumed on another "
        "day reads other prompts; for equal prompts write a fixed date into the chat_template of "
        "a copy of the student's folder"
    )


def special_ids(processing_class: Any) -> set[int]:
    """Returns the ids of a tokenizer's special tokens, without the token for unknown text.

    `all_special_ids` lacks added tokens that have no role, such as the end of turn of Gemma 3.
    """
    added = _added_special_ids(processing_class, len(processing_class))
    found = {*added, *processing_class.all_special_ids}
    return found - ({processing_class.unk_token_id} - {processing_class.eos_token_id})


@lru_cache(maxsize=4)
def _added_special_ids(processing_class: Any, size: int) -> frozenset[int]:
    """Returns the ids of special added tokens; `size` changes if a token is added.

    Every completion asks for them, and Gemma 3 has thousands: to list them takes 8 ms.
    """
    added = processing_class.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special)


def answer_end(processing_class: Any) -> int | None:
    """Returns the token that ends an answer in training; None without one.

    It is the first special token that the chat template writes after an answer. Base models may
    have a template whose end of turn is not the tokenizer's end of text. Without a template, or
    without such a token, it is the end of text.
    """
    end: int | None = processing_class.eos_token_id
    if getattr(processing_class, "chat_template", None) is None:
        return end
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(messages, processing_class, generation_prompt=False)
    except ValueError:
        return end
    _, found, after = text.rpartition(_ANSWER)
    ids = processing_class(after if found else "", add_special_tokens=False)["input_ids"]
    special = special_ids(processing_class)
    return next((token for token in ids if token in special), end)
