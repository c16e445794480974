"""Decides which answers are right: extracts answers from completions and compares them.

`find_domain(gold, prompt)` returns the domain of a problem (number, choice, yes_no, date, math,
text, or your own, added with `register_domain`). Its `extract` returns the final answer of a
completion, `normalise` returns the comparable form of an answer, and `matches` compares two
answers. `Judge` judges many completions at once. The functions below need no problem: they read
numbers, dates and short texts.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from compact.answers.base import (
    DOMAINS,
    Alternative,
    Domain,
    domain_names,
    find_domain,
    get_domain,
    register_domain,
    unified,
)
from compact.answers.choice import Choice
from compact.answers.date import Date
from compact.answers.judge import Judge, Verdict
from compact.answers.mathematics import Mathematics
from compact.answers.number import Number
from compact.answers.pool import CheckerPool
from compact.answers.short_text import General, ShortText
from compact.answers.yes_no import YesNo
from compact.text.numbers import NUMBER, format_number, parse_number

_GENERAL = General()


def normalise_answer(text: str) -> str:
    """Returns the comparable form of an answer.

    A text with exactly one number becomes that number ("$1,450.0" -> "1450", "7 apples" -> "7"). A
    date becomes its ISO form ("5/1/2020" -> "2020-05-01"). Any other text becomes lower case
    without surrounding punctuation ("(B)." -> "b").
    """
    return _GENERAL.normalise(text)


def extract_answer(completion: str) -> str | None:
    """Returns the normalised final answer of a completion, None if there is none.

    The answer follows the last answer marker; without a marker it is the last number or date.
    """
    return _GENERAL.extract(completion)


def answers_match(a: str | None, b: str | None) -> bool:
    """Whether two answers match after normalising; numbers by value."""
    return _GENERAL.matches(a, b)


__all__ = [
    "NUMBER",
    "DOMAINS",
    "Alternative",
    "CheckerPool",
    "Choice",
    "Date",
    "Domain",
    "General",
    "Judge",
    "Mathematics",
    "Number",
    "ShortText",
    "Verdict",
    "YesNo",
    "answers_match",
    "domain_names",
    "extract_answer",
    "find_domain",
    "format_number",
    "get_domain",
    "normalise_answer",
    "parse_number",
    "register_domain",
    "unified",
]
