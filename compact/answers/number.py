"""Numbers: "$1,450.00", "7 apples", "3/4", "1 1/2", "1.5e3", "six"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from compact.answers.arithmetic import value_of
from compact.answers.base import Domain, register_domain
from compact.answers.reading import LONGEST_ANSWER, plain_text, read, unwrap
from compact.text.numbers import (
    NUMBER,
    NUMBER_WORDS,
    format_number,
    parse_number,
    parse_number_words,
)
from compact.text.plain import CALCULATOR

_EQUALS = re.compile(r"=|≈|\\approx\b")
# Words that compute. A number beside one is not all of what a text says: "log 2", "20 plus 5".
_FUNCTION = r"(?:log|ln|exp|sin|cos|tan|sqrt|root|pi|plus|minus|mod|modulo|choose)"
_PART = r"(?:half|halves|thirds?|fourths?|quarters?|fifths?|sixths?|eighths?|tenths?)"
_COMPUTES = (
    rf"(?:{_FUNCTION}|over(?=\s\(?\d)|times(?=\s\(?\d)|divided|multiplied|squared|cubed|factorial"
    rf"|to\sthe\s(?:power|\w+\spower)|dozens?|halves|thirds|(?:and\s)?an?\s{_PART})\b"
)
_PART_BEHIND = re.compile(rf"[\s-](?:{_COMPUTES}|{_PART}\b)", re.IGNORECASE)
_ATTACHED = (  # letters behind a number that are no unknown: 7kg, 7th, 7pm
    r"(?:[kcmnµμ]?[mgslLWVAJN]|[hCFK]|[kM]?Hz|k?Pa|lbs?|oz|ft|in|yd|mi|hr|mph|am|pm|st|nd|rd|th"
    r"|[KMGT]B|k?cal|cc|[^\W\d_]{3,})(?![^\W\d_]|[014-9]|\d\d)"  # cm2, but not 1h30
)
# What stands behind a number that is a part of an expression: a sign that computes, a bracket, a
# command, an unknown, a word that computes. Other words and signs of a sentence may stand there.
_GOES_ON = re.compile(
    r"\s?(?:[*×^÷√·⋅±≤≥_{!]|<(?!/?\w{1,20}>)|>(?!>)|[-+–−]\s?(?:[\d.(\\√{]|[b-hj-z]\b)"
    r"|/\s?(?:[\d.(\\√{]|[xyznk]\b)|\\(?![\\\s]|approx\b|$)|x\s?\d)"
    rf"|[\s-]?(?i:{_COMPUTES})|\((?=[\d\\]|[a-z]\b)|[)\]}}]{{1,3}}(?:[*/^({{√×·]|\s?[-+]\s?[\d\\(])"
    rf"|(?!{_ATTACHED})[^\W\d_]|[²³⁴-⁹]|\s(?![aAImgslhLWVAJNKCF]\b)[^\W\d_]\b(?!['’.])"
)
# The same for what stands before it.
_COMES_FROM = re.compile(
    r"(?:(?:[\d)\]}%]|\b[a-z])\s?[-+/x–−]|[*^×√÷·⋅±_<≤≥]|(?<!>)>|\\(?!approx)[a-zA-Z]{1,12})"
    r"\s?[({\[]?$"
    rf"|[\w)}}]\($|[}}\]]\s?\{{$|(?<![a-zA-Z])(?i:{_FUNCTION})\s?[({{]?$|\d\s(?:times|over)\s$"
)
_SIGNS = re.compile(r"\\[a-zA-Z]|[\^*×√π∞±≤≥_|!²³⁴-⁹]|[(\[{][^)\]}]*[,+/-]")
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z])\s?(?:\^\s?\{?-?[1-3]\}?|[²³])")
_BASE = re.compile(r"(?<=\d)_(?:\w|\{\w{1,3}\})\W*$")  # 1011_2
_PROSE = re.compile(
    rf"(?<![\\a-zA-Z])(?!{_COMPUTES}|\d)(?:[a-z]{{2,}}|i\.e\b|e\.g\b)", re.IGNORECASE
)
_OPPOSITES = re.compile(
    r"\b(?:north|south|east|west|increase|decrease|profit|loss|(?:counter|anti)?-?clockwise)\b",
    re.IGNORECASE,
)
# "2, -1", "3 or 4", "3 to 5" and "2 hours 30 minutes" are several numbers, not one.
_RELATION = (
    r"(?!(?:to|and|or|of|in|for|after|per|at|on|from|with|by|out|than|not|is|are|was|were)\b)"
)
_NAMED = rf"(?:\s?{_RELATION}[a-z%°]{{1,15}})"
_SEVERAL = re.compile(
    rf"\W*\d[\d./]*{_NAMED}?(?:(?:,\s*|\s+|\s?[-–]\s?)(?:(?:and|or|to)\s+)?[-−]?\d[\d./]*{_NAMED}?)+"
    rf"{_NAMED}?\W*",
    re.IGNORECASE,
)
_COMPUTED = re.compile(rf"\W*({NUMBER.pattern})\s+\(([^()]+)\)\W*")  # "48 (6 * 8)"
_LONGEST_LIST = 200
_REMARK = re.compile(r"\([^()]*=[^()]*\)")  # "48 (= 6 * 8)", "4 (n = 1 is excluded)"
# An expression that is the answer; "9 * 2" only says how it was computed.
_EXPRESSION = re.compile(r"\d.*[a-zA-Z\\√π]|[a-zA-Z\\√π].*\d")
SEVERAL_EQUATIONS = re.compile(r"=[^=]*(?:[,;](?!\d{3}\b)|\b(?:and|or)\b)[^=]*=")  # "x = 3, y = 5"
_UNKNOWNS = re.compile(r"\b[a-zA-Z]\s?=[^=]*(?:[,;]\s?(?:and\s)?|\b(?:and|or)\s)[a-zA-Z]\s?=")
# Bounds are not the answer: "between 7 and 8", "the difference between 7 and 8 is 1".
_BETWEEN = re.compile(rf"\bbetween\s{NUMBER.pattern}\sand\s{NUMBER.pattern}", re.IGNORECASE)
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
_SPACED = re.compile(r"\W*\d{1,3}(?: \d{3})+(?:[.,]\d+)?(?:\s?[a-zA-Z%°]{1,15}){0,2}\W*")
_UNIT_WORDS = 4
_LONG_WORD = re.compile(r"[^\W\d_]{2,}")
_SHORT = 2  # most words of a sentence that is an answer by itself: "Seven apples."


def same_number(a: str, b: str) -> bool | None:
    """Returns whether two texts are the same number, or None if one of them is no number.

    Whole numbers must be equal. Others may differ by a millionth of their size.
    """
    x, y = parse_number(a), parse_number(b)
    if x is None or y is None:
        return None
    if x.denominator == y.denominator == 1:
        return x == y
    return abs(x - y) <= max(abs(x), abs(y)) / 10**6


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
        before = text[max(0, found.start() - 16) : found.start()]
        if _GOES_ON.match(text, found.end()) or _COMES_FROM.search(before):
            continue
        if parse_number(found.group()) is not None:
            yield found


def stated_number(sentence: str, *, last: bool) -> str | None:
    """Returns the number that a sentence states, in normal form.

    That is the first number after the last "=" if there is one, else the first or, with `last`, the
    last number of the sentence.
    """
    said = _BETWEEN.sub(" ", _without_remarks(sentence))
    rounded = _ROUNDED.search(said)
    if rounded:
        return _form(rounded[1])
    equals = [found.end() for found in _EQUALS.finditer(said)]
    tail = said[equals[-1] :] if equals else ""
    if _several(tail or said) or _UNKNOWNS.search(said):
        return None
    found = next(free_numbers(tail), None)
    if found is None and not _EXPRESSION.search(tail):
        numbers = list(free_numbers(said))
        found = numbers[-1 if last else 0] if numbers else None
    return _form(found.group()) if found else None


def _without_remarks(sentence: str) -> str:
    """Returns a sentence without "(= 6 * 8)" or "(6 * 8)", unless its only numbers are in there."""
    computed = _COMPUTED.fullmatch(sentence)
    if computed and value_of(computed[2]) == parse_number(computed[1]):
        return computed[1]
    said = _REMARK.sub(" ", sentence)
    return said if re.search(r"\d", said) else sentence


def _several(text: str) -> bool:
    """Whether a text is several numbers: "2, -1"; "1 1/2" and "1,450" are one."""
    if len(text) > _LONGEST_LIST or len(NUMBER.findall(text)) < 2:
        return False
    return bool(_SEVERAL.fullmatch(text))


def _form(text: str) -> str | None:
    number = parse_number(text)
    return None if number is None else format_number(number)


def bare_number(answer: str) -> str | None:
    """Returns the normal form of a text that is one number, None if it is anything else.

    Words may stand behind the number, such as a unit, but not before it: "Apollo 11" is a name. A
    sum is computed: "4 * 3" is 12. A number in words counts.
    """
    text = CALCULATOR.sub("", unwrap(answer[:LONGEST_ANSWER])).strip()
    if _NOT.match(text) or SEVERAL_EQUATIONS.search(text) or _OPPOSITES.search(text):
        return None
    number = _form(text.strip(" ,:;!?()[]{}\"'").rstrip("."))
    if number is not None:
        return number
    text = _without_remarks(text)
    sides = _EQUALS.split(text)
    if len(sides) > 1 and re.search(r"[\d\w)}]\W*$", text):
        if any(len(_LONG_WORD.findall(side)) >= _UNIT_WORDS for side in sides[:-1]):
            return None  # "SELECT name FROM t WHERE a = 1"
        text = sides[-1]
    text = _BASE.sub("", _UNIT_POWER.sub("", text))
    every = list(NUMBER.finditer(text))
    if len(every) == 1:
        before, behind = text[: every[0].start()], text[every[0].end() :]
        alone = not re.search(r"\w", before) and not _SIGNS.search(before + behind.rstrip("!"))
        if alone and next(free_numbers(text.rstrip("!")), None):
            return _form(every[0].group())
    if every:
        value = None if _PROSE.search(text) else value_of(text)
        return None if value is None else format_number(value)
    words = NUMBER_WORDS.match(text)
    return None if not words or re.search(r"\d", text) else _from_words(words)


def _from_words(words: re.Match[str]) -> str | None:
    """Returns the number that is given in words, None if they go on ("three quarters")."""
    if _PART_BEHIND.match(words.string, words.end()):
        return None
    value = parse_number_words(words.group())
    return None if value is None else format_number(value)


def stated(sentence: str) -> str | None:
    """Returns the number that a sentence states, in digits or in words; "" after "not"."""
    if _NOT.match(sentence):
        return ""
    number = bare_number(sentence)
    if number is not None or not _PROSE.search(sentence):
        return number
    return stated_number(sentence, last=False) or _in_words(sentence)


def opening(sentence: str) -> str | None:
    """Returns the number at the start of a sentence; one word or "x =" may come before it."""
    number = bare_number(sentence)
    if number is not None:
        return number
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


def _tidy(text: str) -> str:
    """Writes "7:00" as 7, and "2 500 kg" without the space."""
    if _SPACED.fullmatch(text):
        text = re.sub(r"(?<=\d) (?=\d{3})", "", text)
    return _FULL_HOUR.sub(r"\1", text)


def _in_words(sentence: str) -> str | None:
    """Returns the first number in words; "one" counts only at the start of the sentence."""
    if re.search(r"\d", sentence):
        return None
    for words in NUMBER_WORDS.finditer(sentence):
        if words.group().lower() != "one" or not re.search(r"\w", sentence[: words.start()]):
            number = _from_words(words)
            if number is not None:
                return number
    return None


@register_domain("number")
@dataclass(frozen=True)
class Number(Domain):
    """Numbers, equal within a millionth of their size; units and currency are dropped.

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
        text = _tidy(answer[:LONGEST_ANSWER])
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
        return stated(_tidy(sentence))

    def opening(self, sentence: str) -> str | None:
        """Returns the number at the start of a sentence."""
        return opening(_tidy(sentence))

    def final(self, sentence: str) -> str | None:
        """Returns the last number, or the first after the last "="."""
        return final(_tidy(sentence))

    def matches(self, a: str | None, b: str | None) -> bool:
        """Compares as numbers if both are numbers, else as plain text."""
        return match_by_value(self, a, b)
