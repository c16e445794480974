"""The one notion of a right answer: reading answers out of completions and comparing them.

`find_domain(gold, prompt)` gives the domain of a problem (number, choice, yes_no, date, math, text
or one of your own, added with `register_domain`); its `extract` reads the final answer of a
completion, `normalise` brings an answer into comparable form and `matches` says whether two are the
same. `Judge` judges many completions at once. The functions below are for callers without a problem
at hand: they read numbers, dates and short texts.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from compact.answers.base import (
    DOMAINS,
    Domain,
    domain_names,
    find_domain,
    get_domain,
    register_domain,
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

    A text with exactly one number becomes that number ("$1,450.0" -> "1450", "7 apples" -> "7"), a
    date the date ("5/1/2020" -> "2020-05-01"); any other becomes lower case without surrounding
    punctuation ("(B)." -> "b").
    """
    return _GENERAL.normalise(text)


def extract_answer(completion: str) -> str | None:
    """Returns the normalised final answer of a completion, None where there is none.

    It is read behind the last answer marker; without one it is the last number.
    """
    return _GENERAL.extract(completion)


def answers_match(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same after normalising; numbers up to 1e-6 of their size."""
    return _GENERAL.matches(a, b)


__all__ = [
    "NUMBER",
    "DOMAINS",
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
]
