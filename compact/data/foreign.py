"""Prepares rows of other projects for `compact.data.importers`.

Fields get the names that the importers know. Options in a field of their own are written into the
question. A row with something that has no place in our format, such as an image, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from compact.answers import Choice
from compact.answers.choice import read_options
from compact.answers.reading import plain_text
from compact.text.steps import find_marker

LONGEST_GOLD = 200
"""Most characters of a gold answer; a longer text is a rationale."""
_LOST = ("tools", "chat_template_kwargs", "image", "images")
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question")
"""The fields that may hold the question of a row."""
_ALIASES = {"problem": "question", "query": "instruction", "response": "output"}
"""Other name of a field -> ours, in rows that have the question under no name of ours."""
_OPTIONS = ("options", "choices")
_FRONTS = [re.compile(rf"\(?{letter}[).:]\s*") for letter in ascii_uppercase]
"""What may stand before each option: "A)", "(A)", "A.", "A:"."""
_ANSWERS = ("answer", "label", "correct", "answerkey")
_QUESTIONS = ("question", "input", "instruction", "prompt")
_CHATS = ("prompt", "conversations", "messages")


def is_rationale(text: str) -> bool:
    """Returns whether a field `answer` holds a rationale: it has a marker or lines, or is long."""
    # The marker last, because to look for it takes longest.
    return "\n" in text.strip() or len(text) > LONGEST_GOLD or find_marker(text) < len(text)


def prepared(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns a row with the names of fields that the importers know, and options in the question.

    Raises:
        ValueError: as `with_options`; or the row has tools or an image, which would be lost.
    """
    lost = next((name for name in _LOST if row.get(name)), None)
    if lost is not None:
        raise ValueError(f"{where}: {lost} must be empty, got a value, which would be lost")
    if not any(name in row for name in PROMPTS):
        row = {**row, **{ours: row[name] for name, ours in _ALIASES.items() if name in row}}
    return with_options(row, where)


def with_options(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns a row whose question ends with its options and whose answer is the letter of one.

    `options` or `choices` may be a list of texts (AQuA-RAT, ScienceQA, MMLU), an object of letters
    and texts (MedQA), or one with the lists `label` and `text` (ARC, CommonsenseQA). They are
    written as "(A) text", a line each, unless the question has them already. Before them stands
    `hint`, in which ScienceQA gives what the question is about. The gold answer (answer, label,
    correct or answerKey) may be a letter or label, the text of an option, or its index from 0; a
    number is an index. A row without options is returned as it is.

    Raises:
        ValueError: the answer is none of the options, or a chat would lose them.
    """
    labels, texts = _options(row)
    if not texts:
        return row
    if len(texts) > len(ascii_uppercase):
        raise ValueError(f"{where}: expected at most 26 options, got {len(texts)}")
    choice = Choice(tuple(zip(ascii_uppercase, map(plain_text, texts), strict=False)))
    found = dict(row)
    if not any(read_options(text) == choice.options for text in _prompts(row)):
        name = next((n for n in _QUESTIONS if _is_text(row.get(n))), None)
        if name is None:
            raise ValueError(
                f"{where}: the options must stand in the chat, as lines such as (A) ..., got a "
                "field of their own, which would be lost"
            )
        lines = [row[name], row["hint"]] if _is_text(row.get("hint")) else [row[name]]
        lines += [f"({ascii_uppercase[i]}) {text}" for i, text in enumerate(texts)]
        found[name] = "\n".join(line.strip() for line in lines)
    given = (row.get(name) for name in _ANSWERS)
    answer = next((a for a in given if a not in (None, "") and not isinstance(a, bool)), None)
    if isinstance(answer, int) or (isinstance(answer, str) and not is_rationale(answer)):
        found["answer"] = _letter(answer, labels, choice)
        if found["answer"] is None:
            raise ValueError(
                f"{where}: the answer must be the letter, the text or the index from 0 of one of "
                f"{len(texts)} options, got {answer!r}"
            )
    return found


def _options(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns labels and texts of the options; the labels are [] if the row has none of its own."""
    given = next((row[name] for name in _OPTIONS if row.get(name)), None)
    labels: list[Any] = []
    if isinstance(given, Mapping) and {"label", "text"} <= given.keys():
        labels, given = given["label"], given["text"]
    elif isinstance(given, Mapping) and all(len(str(key)) == 1 for key in given):
        labels, given = list(given), list(given.values())
    if not isinstance(given, list) or len(given) < 2 or not all(map(_is_option, given)):
        return [], []
    texts = [" ".join(str(each).split()) for each in given]
    labelled = list(zip(_FRONTS, texts, strict=False))
    if all(front.match(text) for front, text in labelled):  # "A)21", as in AQuA-RAT
        texts = [front.sub("", text, count=1) for front, text in labelled]
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = []
    return [str(label) for label in labels], texts


def _is_option(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number or _is_text(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _prompts(row: Mapping[str, Any]) -> list[str]:
    """Returns the texts of a row's question, in which the options may stand."""
    turns = [t for name in _CHATS if isinstance(row.get(name), list) for t in row[name]]
    found = [t.get("content", t.get("value")) for t in turns if isinstance(t, Mapping)]
    found += [row.get(name) for name in _QUESTIONS]
    return [text for text in found if isinstance(text, str)]


def _letter(answer: str | int, labels: list[str], choice: Choice) -> str | None:
    """Returns the letter of a gold answer, None if it is none of the options."""
    text = str(answer).strip()
    if text in labels:
        return choice.letters[labels.index(text)]
    letter = None if isinstance(answer, int) else choice.normalise(text)
    if letter in dict(choice.options):
        return letter
    index = int(text) if re.fullmatch(r"\d{1,3}", text) else len(choice.letters)
    return choice.letters[index] if index < len(choice.letters) else None
