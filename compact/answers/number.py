"""Numbers: "$1,450.00", "7 apples", "3/4", "1 1/2", "1.5e3", "six"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from compact.answers.base import Domain, register_domain
from compact.answers.reading import LONGEST_ANSWER, plain_text, read, unwrap
from compact.text.numbers import (
    NUMBER,
    NUMBER_WORDS,
    format_number,
    parse_number,
    parse_number_words,
)

_EQUALS = re.compile(r"=|≈|\\approx\b")
# A number next to an operator, a root or an unknown is part of an expression and not an answer,
# such as the 6 of "6*sqrt(2)" and the 3 of "3 + 4".
_GOES_ON = re.compile(
    r"\s?(?:[*×^÷√·!]|[-+/–]\s?(?:[\d.(\\√]|sqrt|pi\b|[xyz]\b)|x\s?\d|\\?sqrt|\\?pi\b|π"
    r"|\\(?:times|cdot|div|frac|log|ln|pm)|[xyzni]\b)|\((?=[\d\\])|\}\s?\{|\)/\((?!\d+\)\s*$)"
)
_COMES_FROM = re.compile(
    r"(?:[\d)}]\s?[-+*/×÷x–]|[*^×√÷]|sqrt|\b[a-z]\s?[-+/])\s?[({]?$|[\w)}]\($"
    r"|\}\s?\{$|±\s?$|\bpm\s?$"
)
# "2, -1" and "3 or 4" are several answers, not one.
_SEVERAL = re.compile(r"\W*[-−]?\d[\d./]*(?:(?:,\s*|\s+)(?:(?:and|or)\s+)?[-−]?\d[\d./]*)+\W*")
_REMARK = re.compile(r"\([^()]*=[^()]*\)")  # "48 (= 6 * 8)", "4 (n = 1 is excluded)"
# An expression that is the answer; "9 * 2" only says how it was computed.
_EXPRESSION = re.compile(r"\d.*[a-zA-Z\\√π]|[a-zA-Z\\√π].*\d")
SEVERAL_EQUATIONS = re.compile(r"=[^=]*(?:[,;](?!\d{3}\b)|\b(?:and|or)\b)[^=]*=")  # "x = 3, y = 5"
_BRACKETS = re.compile(r"(?<=\s)\([^()]*\s[^()]*\)")  # "18 (9 eggs at 2)"
_ROUNDED = re.compile(
    rf"\bround(?:s|ed|ing)\s(?:(?:it|this|that)\s)?(?:(?:up|down|off)\s)?(?:to|gives)\s\$?({NUMBER.pattern})"
    r"(?!\s(?:decimal|place|significant|digit))"
)
_NOT = re.compile(r"\W*not\b", re.IGNORECASE)
# One word may come before the number, but none that makes it a part of the question: "In 5 days".
_OPENING = re.compile(
    r"\W*(?:(?!(?:with|after|in|for|at|from|since|if|each|every|on|by|of|over|during|because|when"
    r"|given|within|per|step)\b)\w+\W+)?(?:\W*(?:=|≈)\W*)?",
    re.IGNORECASE,
)
# If the answer is a number, a time on the full hour counts as a number: "2:00 pm" is 2.
_FULL_HOUR = re.compile(r"(?<![\d:.,])(\d{1,2}):00(?![\d:])")
_UNIT_WORDS = 4
_SHORT = 2  # most words of a sentence that is an answer by itself: "Seven apples."


def same_number(a: str, b: str) -> bool | None:
    """Whether two texts are numbers within 1e-6 x max(size, 1); None if one is not a number."""
    x, y = parse_number(a), parse_number(b)
    if x is None or y is None:
        return None
    size = max(abs(x), abs(y), Fraction(1))
    return abs(x - y) <= size / 10**6


def match_by_value(domain: Domain, a: str | None, b: str | None) -> bool:
    """Compares two answers as numbers if both are numbers, else by their normal form."""
    if a is None or b is None:
        return False
    x, y = domain.normalise(a), domain.normalise(b)
    same = same_number(x, y)
    return x == y if same is None else same


def free_numbers(text: str) -> Iterator[re.Match[str]]:
    """Yields the numbers of an unwrapped text that are not part of an expression."""
    for found in NUMBER.finditer(text):
        before = text[max(0, found.start() - 6) : found.start()]
        if _GOES_ON.match(text, found.end()) or _COMES_FROM.search(before):
            continue
        if parse_number(found.group()) is not None:
            yield found


def stated_number(sentence: str, *, last: bool) -> str | None:
    """Returns the number that a sentence states, in normal form.

    That is the first number after the last "=" if there is one, else the first or, with `last`, the
    last number of the sentence.
    """
    if _SEVERAL.fullmatch(sentence) and parse_number(sentence.strip(" .")) is None:
        return None
    said = _REMARK.sub(" ", sentence)
    said = said if re.search(r"\d", said) else sentence
    rounded = _ROUNDED.search(said)
    if rounded:
        return _form(rounded[1])
    equals = [found.end() for found in _EQUALS.finditer(said)]
    tail = said[equals[-1] :] if equals else ""
    found = next(free_numbers(tail), None)
    if found is None and not _EXPRESSION.search(tail):
        numbers = list(free_numbers(said))
        found = numbers[-1 if last else 0] if numbers else None
    return _form(found.group()) if found else None


def _form(text: str) -> str | None:
    number = parse_number(text)
    return None if number is None else format_number(number)


def bare_number(answer: str) -> str | None:
    """Returns the normal form of a text with exactly one number or number in words, else None."""
    text = unwrap(answer[:LONGEST_ANSWER]).strip()
    if _NOT.match(text) or SEVERAL_EQUATIONS.search(text):
        return None
    number = _form(text.strip(" ,:;!?()[]{}\"'").rstrip("."))
    if number is not None:
        return number
    text = _EQUALS.split(text)[-1] if re.search(r"[\d\w]\s*$", text) else text
    every = NUMBER.findall(text)
    if every:
        return stated_number(text, last=False) if len(every) == 1 else None
    words = NUMBER_WORDS.match(text)
    if words and not re.search(r"\d", text):
        value = parse_number_words(words.group())
        return None if value is None else format_number(value)
    return None


def stated(sentence: str) -> str | None:
    """Returns the number that a sentence states, in digits or in words; "" after "not"."""
    if _NOT.match(sentence):
        return ""
    return stated_number(sentence, last=False) or _in_words(sentence)


def opening(sentence: str) -> str | None:
    """Returns the number at the start of a sentence; one word or "x =" may come before it."""
    first = next(free_numbers(sentence), None)
    if first:
        opens = first.start() < 60 and _OPENING.fullmatch(sentence[: first.start()])
        return stated(sentence) if opens else None
    return _in_words(sentence)


def final(sentence: str) -> str | None:
    """Returns the last number of a sentence, "" if all numbers are parts of an expression."""
    outside = _BRACKETS.sub(" ", sentence)
    if not _EQUALS.search(sentence) and next(free_numbers(outside), None):
        sentence = outside
    if NUMBER.search(sentence):
        return stated_number(sentence, last=True) or ""
    return _in_words(sentence) if len(sentence.split()) <= _SHORT else None


def _in_words(sentence: str) -> str | None:
    """Returns the first number in words; "one" counts only at the start of the sentence."""
    if re.search(r"\d", sentence):
        return None
    for words in NUMBER_WORDS.finditer(sentence):
        if words.group().lower() != "one" or not re.search(r"\w", sentence[: words.start()]):
            value = parse_number_words(words.group())
            if value is not None:
                return format_number(value)
    return None


@register_domain("number")
@dataclass(frozen=True)
class Number(Domain):
    """Numbers, equal within 1e-6 x max(size, 1); units and currency are dropped.

    "50%" is 50. A number in words counts; a number in an expression ("6*sqrt(2)") does not.
    """

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Number | None:
        """Accepts one number, alone or with a unit of a few words: "7 square feet", "$18"."""
        if gold is None or bare_number(gold) is None:
            return None
        text = unwrap(gold)
        found = NUMBER.search(text) or NUMBER_WORDS.search(text)
        if found is None or re.search(r"\w", text[: found.start()].rpartition("=")[2]):
            return None
        return cls() if len(text[found.end() :].split()) <= _UNIT_WORDS else None

    def normalise(self, answer: str) -> str:
        """Returns the number ("$1,450.0" -> "1450"), or plain text if there is not exactly one."""
        text = _FULL_HOUR.sub(r"\1", answer[:LONGEST_ANSWER])
        plain = plain_text(text)
        return bare_number(text) or bare_number(plain) or plain

    def extract(self, completion: str) -> str | None:
        """Returns the number after the last answer marker, else the last number.

        A stated answer that is an expression or a word is returned as plain text, which no number
        matches.
        """
        return read(self, completion)

    def stated(self, sentence: str) -> str | None:
        """Returns the first number, or the first after the last "="."""
        return stated(_FULL_HOUR.sub(r"\1", sentence))

    def opening(self, sentence: str) -> str | None:
        """Returns the number at the start of a sentence."""
        return opening(_FULL_HOUR.sub(r"\1", sentence))

    def final(self, sentence: str) -> str | None:
        """Returns the last number, or the first after the last "="."""
        return final(_FULL_HOUR.sub(r"\1", sentence))

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares as numbers if both are numbers, else as plain text."""
        return match_by_value(self, a, b)
