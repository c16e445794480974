"""Finds the mathematics of a step: its numbers, and its equations with a check of their arithmetic.

"290 bananas / 2 groups = 145 bananas per group" becomes the equation 290/2=145, which holds. Units,
currency signs and thousands separators are removed. An expression in which something cannot be read
("x + 4", "f(3) + 2", "half of 10 + 2") is unknown, up to the next "=" or end of a clause, and its
equations are skipped: a reader that guesses calls correct mathematics wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from compact.text.numbers import NUMBER, SCALE, format_number, parse_number, scale_of
from compact.text.plain import ACTS_BACK, ACTS_ON, CONJUNCTIONS, LIST_NUMBER, plain
from compact.text.units import CENT, Unit, takes_a_smaller_one, unit_of


class Equation(NamedTuple):
    """One equality "left = right" of a text.

    Attributes:
        key: the equation in normal form; the operands of a pure sum or product are sorted.
        operands: the numbers of the left side, in order.
        result: the number or expression on the right side, in normal form.
        holds: whether the arithmetic is right, up to the rounding of the right side.
        right: the numbers of the right side, without signs.
    """

    key: str
    operands: tuple[str, ...]
    result: str
    holds: bool
    right: tuple[str, ...]


_OTHER_ARITHMETIC = re.compile(
    r"\bp?mod\b|\bmodulo\b|≡|\\equiv|\bbinary\s(?:number|addition)"
    r"|\b(?:in|into|to|from)\s(?:binary|octal|hexadecimal|base[ -]?(?!10\b)\d)",
    re.IGNORECASE,
)
"""A text with this may say 3 * 5 = 1 (mod 7) and be right."""
_LINKS = frozenset(("the", "by", "than"))  # "divided by 2", "the root of the 16"
_JOINS = frozenset(("of", "to", "at", "for", "with", "by"))  # "3 groups of 5", "5 tickets at $8"
_RATES = frozenset(("each", "per", "every", "apiece"))
_TOKEN = re.compile(
    r"(?P<skip>\d{1,2}:\d{2}(?!\d)|\d{1,2}\s?(?:[ap]\.?m|[AP]\.?M)\b"  # a time
    r"|\d+(?:st|nd|rd|th)\b|\d+-(?=[A-Za-z]))"  # 3rd, 5-year
    r"|(?P<unknown>\d*[A-Za-z]+_\(?\w+\)?"  # a_1
    r"|\d+(?:\.\d+)?[a-zA-Z]\b(?!\.)|(?<=\))[a-zA-Z]\b"  # 2x, (1/2)x
    r"|\d+(?![xX]\d)[A-Za-z]+\d\w*|(?<![\d)%])(?<![\d)%]\s)[A-Za-z]+\d\w*"  # 0b11, x1
    r"|\d+\.\d+[A-Za-z]+\d\w*"  # 1.5e3
    r"|[A-Za-z]+(?=\()|(?<=[\d)])(?:!|\s?(?:\.{3}|…)(?=\s?[(\d]))|_+|\?)"  # f(3), 5!, (2)...(9)
    r"|(?P<number>\d+(?:\.\d+)?|(?<![A-Za-z])\.\d+)"
    rf"(?:(?P<percent>\s?(?:%|per\s?cent\b))|(?P<scale>{SCALE}(?!['’-])))?"
    r"|(?P<of>\bof\b)"
    r"|(?P<times>(?<=[\d)%\s])(?:[xX]|times\b)(?=\s*(?:[$(\d]|\.\d)))"
    rf"|\b(?i:(?P<and>{CONJUNCTIONS})|(?P<back>{ACTS_BACK})|(?P<operation>{ACTS_ON}))\b(?!['’-])"
    r"|(?P<word>[A-Za-z][A-Za-z'’-]*|(?:(?<=\d)|(?<=\d\s))¢(?!\d))"
    r"|(?P<sign>[-+*/^=≈()])"
    r"|(?P<stop>[^\s$£€¥₹¢°])"
)
_MOST_UNIT_WORDS = 5
_REFUTED = re.compile(
    r"(?:is|was)(?:\snot|n['’]t)\s(?:true|right|correct)\b|(?:is|was)\s(?:false|wrong|incorrect)\b"
)
"""What follows an equation that the text itself rejects: "7 + 7 = 15 is not true"."""
_SCIENTIFIC = re.compile(r"\d+(?:\.\d+)?\*10\^\(?(-?\d{1,2})\)?")
_POWER_OF_TEN = re.compile(r"n\*n\^(?:-?n|\(-?n\))")
_OPEN = "+-*/^("
"""After these an expression goes on."""
_MARKS = _OPEN + ")"
_CLAUSE_ENDS = frozenset(",;:.!\"'“”‘’«»…→⇒∴✓✔#`")
_ROUGH = 0.1
"""How far, relatively, the sides of "≈" may be apart."""


class _Term(NamedTuple):
    """A token of an expression.

    Attributes:
        text: a sign or bracket, or the digits of a number.
        value: the number as written, not divided by 100 for "%"; 0 for a sign.
        scale: what "million" multiplied the value by, 1 without such a word.
        percent: whether the number may count hundredths: "20%", "20 cents".
        rate: whether the number is for one of several: "5 each", "$8 per hour".
        unit: its unit of measure, None for anything else.
        rough: whether the number is on the right of "≈".
        maybe: whether this is the product of "5 (3 + 2)", which may be 5 and a remark.
        tight: whether this is the "/" of "1/2", with no space or word beside it.
    """

    text: str
    value: float = 0.0
    scale: int = 1
    percent: bool = False
    rate: bool = False
    unit: Unit | None = None
    rough: bool = False
    maybe: bool = False
    tight: bool = False


@lru_cache(maxsize=65536)
def numbers(text: str) -> tuple[str, ...]:
    """Returns the distinct numbers of a text in normal form, in order of appearance."""
    found: dict[str, None] = {}
    for match in _TOKEN.finditer(plain(text)):
        if match["number"] or match["unknown"]:
            number = _number_in(match)
            if number is not None:
                found[format_number(number)] = None
    return tuple(found)


def _number_in(match: re.Match[str]) -> Fraction | None:
    """Returns the number of a token; the scale of "1/2 million" belongs to all of the fraction."""
    digits = NUMBER.search(match["number"] or match["unknown"])
    number = parse_number(digits.group()) if digits else None
    return number if number is None or _divides(match) else number * scale_of(match["scale"])


def _divides(match: re.Match[str]) -> bool:
    return match.string[match.start() - 1 : match.start()] == "/"


def list_number(step: str) -> str:
    """Returns the list number that a step begins with ("1. ", "Step 2: "), "" if there is none."""
    bare = step.lstrip("*_")  # bold
    found = LIST_NUMBER.match(bare)
    return step[: len(step) - len(bare) + found.end()] if found else ""


@lru_cache(maxsize=65536)
def equations(text: str) -> tuple[Equation, ...]:
    """Returns the equations of a text; "48 + 24 = 72 = 8 * 9" has two.

    "3 * 12 = 36 + 6 = 42" is not correct as written, but common. It is read as 3 * 12 = 36 and
    36 + 6 = 42.
    """
    found: list[Equation] = []
    for chain in _chains(plain(text)):
        for i, (left, right) in enumerate(zip(chain[:-1], chain[1:], strict=True)):
            equation, remark = _equation(left, right), _remark(right)
            if equation is None or equation.holds or not right:
                pass
            elif i and _remark(left):  # the left side of this equation may be wrong
                continue
            elif remark:  # "= 5 (3 red + 2 blue)"
                equation = _equation(left, right[:remark])
            elif i + 2 < len(chain):
                ran_on = _equation(left, right[:1])
                equation = ran_on if ran_on is not None and ran_on.holds else equation
            if equation is not None:
                found.append(equation)
    return tuple(found)


def equations_of_steps(steps: Sequence[str]) -> list[tuple[Equation, ...]]:
    """Returns the equations of each step; none if the text computes with other rules, as modulo."""
    if any(_OTHER_ARITHMETIC.search(step) for step in steps):
        return [()] * len(steps)
    return [equations(step) for step in steps]


def _remark(terms: Sequence[_Term] | None) -> int:
    """Returns where what may be a remark begins in an expression; 0 without one."""
    return next((i for i, term in enumerate(terms or ()) if term.maybe), 0)


def _chains(text: str) -> list[list[list[_Term] | None]]:
    """Returns chains of expressions joined by "="; an expression that cannot be read is None."""
    reader = _Reader(text)
    for match in _TOKEN.finditer(text):
        reader.take(match)
    reader.close_chain()
    return reader.chains


class _Reader:
    """Reads a text token by token.

    Attributes:
        chains: the finished chains.
        chain: the finished expressions of the chain that is read.
        terms: the terms of the expression that is read.
        words: words since the last number or sign.
        unknown: whether the expression cannot be read.
        operated: whether the last word was one that computes something.
        rough: whether the last "=" was "≈".
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.chains: list[list[list[_Term] | None]] = []
        self.chain: list[list[_Term] | None] = []
        self.terms: list[_Term] = []
        self.words, self.unknown, self.operated, self.rough = 0, False, False, False

    def take(self, match: re.Match[str]) -> None:
        """Reads the next token."""
        kind, text = match.lastgroup, match.group()
        before = self.text[match.start() - 1 : match.start()]
        if kind in ("number", "percent", "scale"):
            self._number(match, before)
        elif kind == "word" or (kind in ("operation", "back") and before == "/"):
            self._word(match, text, before)
        elif kind == "and":
            self.close_chain()
        elif kind in ("operation", "back"):
            counted = kind == "back" and self._complete() and not self.words  # 5 squared, 2 dozen
            self.unknown = self.unknown or self._open() or counted
            self.operated = True
            self.words += 1
        elif kind == "unknown":
            self._symbol(match, text)
        elif kind in ("times", "of"):
            self._times(kind)
        elif kind == "sign" and text in "=≈":
            self.unknown = self.unknown or self.operated or self._open()
            self._close_side()
            self.rough = text == "≈"
        elif kind == "sign":
            self._sign(match, text, before)
        elif kind == "skip":
            self.words += 1
        else:
            self._mark(match, text, before)

    def close_chain(self, unread: bool = False) -> None:
        """Ends the chain; `unread`: what follows belongs to something that could not be read."""
        self._close_side()
        if len(self.chain) > 1:
            self.chains.append(self.chain)
        self.chain, self.unknown = [], unread

    def _close_side(self) -> None:
        self.chain.append(None if self.unknown or not self.terms else self.terms)
        self.terms, self.words = [], 0
        self.unknown, self.operated, self.rough = False, False, False

    def _open(self) -> bool:
        """Whether the expression so far must go on."""
        return bool(self.terms) and self.terms[-1].text in _OPEN

    def _complete(self) -> bool:
        """Whether the expression so far may end."""
        return bool(self.terms) and self.terms[-1].text not in _OPEN

    def _after(self, match: re.Match[str]) -> str:
        """The next character, but for one space."""
        return self.text[match.end() : match.end() + 2].lstrip()[:1]

    def _number(self, match: re.Match[str], before: str) -> None:
        if self._complete():  # two numbers with no sign in between
            if self._goes_on(match["number"]):
                self.unknown = True
            else:
                last = self.text[max(match.start() - 8, 0) : match.start()].rstrip(" $€£")
                linked = last.rpartition(" ")[2] in _JOINS
                self.close_chain(unread=self.operated or linked or self.words == 0)
        elif self.words and not self.terms and self.chain:  # "= she has 5": words after the "="
            self.close_chain(unread=self.operated)
        scale = scale_of(match["scale"])
        # "half of 10", "1/2 million"
        self.unknown = self.unknown or self.operated or (scale > 1 and _divides(match))
        number, unit = match["number"], unit_of(before)
        percent = bool(match["percent"]) or unit == CENT
        term = _Term(number, float(number) * scale, scale, percent, unit=unit, rough=self.rough)
        self.terms.append(term)
        self.words, self.operated = 0, False

    def _goes_on(self, number: str) -> bool:
        """Whether the number belongs to the one before: "1 hour 15 minutes", "18 000"."""
        last = self.terms[-1]
        thousands = self.words == 0 and len(number) == 3 and len(last.text) < 4
        return thousands or (self.words == 1 and takes_a_smaller_one(last.unit))

    def _word(self, match: re.Match[str], text: str, before: str) -> None:
        unit = unit_of(text)
        counted = self._complete() and self.words == 0
        beside = counted or self._after(match) in set("+-*/^=≈(")
        named = len(text) > 1 or unit  # any other letter is a variable: "1/a"
        rate = text.lower() in _RATES or (counted and text in ("a", "an"))
        if self._open() and before and before in "/-" and named:
            self.terms.pop()  # "ounces/gallon": a unit, not a division
            rate = before == "/"
        elif self._open() or (before.isdecimal() and len(text) < 4 and not unit):
            self.unknown = True  # "4 + x", "2xy"
        elif counted and unit:
            percent = self.terms[-1].percent or unit == CENT
            self.terms[-1] = self.terms[-1]._replace(unit=unit, percent=percent)
        elif len(text) == 1 and text not in "aAI" and beside:
            self.unknown = True  # a variable
        if rate and self._complete():
            self.terms[-1] = self.terms[-1]._replace(rate=True)
        if text in ("is", "equals", "makes") and self.chain and len(self.terms) > 2:
            self.unknown = True  # computed aloud: "= 4 + 5 is 9"
        if self.chain and _REFUTED.match(self.text, match.start()):
            self.unknown = True
        self.words += 1
        self.operated = self.operated and text.lower() in _LINKS
        if self.words > _MOST_UNIT_WORDS and self.terms:
            self.close_chain()

    def _symbol(self, match: re.Match[str], text: str) -> None:
        if text == "?" and not self.terms and self.chain:  # "25 * 14 = ?"
            self.close_chain()
        if self._after(match) == "(" and self.words and self._complete():
            self.close_chain()  # another expression: "3 is sqrt(9)"
        self.unknown = True

    def _times(self, kind: str) -> None:
        terms = self.terms
        percent = terms and terms[-1].percent and terms[-1].unit is None
        share = percent or [t.text for t in terms[-2:-1]] == ["/"]
        if self._complete() and (kind == "times" or (share and not self.words)):
            terms.append(_Term("*"))
            self.words = 0
        elif kind == "of":
            self.words += 1

    def _sign(self, match: re.Match[str], text: str, before: str) -> None:
        self.unknown = self.unknown or self.operated  # "5 squared + 3"
        if text == "(" and self._complete():
            if self.words:  # a remark in brackets
                self.close_chain(unread=self.operated)
            else:
                self.terms.append(_Term("*", maybe=before == " "))
        if text in "+*/^" and not self._complete():  # it goes with something that was not read
            self.unknown = True
            if not self.terms:
                return
        if text == "^" and self.words:  # 3 cm^2
            self.unknown = True
        spaced = self.text[match.end() : match.end() + 1] == " "
        if text == "-" and not self.terms and (self.words or spaced):
            self.unknown = True
        tight = text == "/" and not (self.words or spaced or before == " ")
        self.terms.append(_Term(text, tight=tight))
        self.words, self.operated = 0, False

    def _mark(self, match: re.Match[str], text: str, before: str) -> None:
        following = self.text[match.end() : match.end() + 1]
        ends = _ends_clause(text, before, following)
        root = text == "\\" or (text in "√π" and (before == ")" or before.isdecimal()))
        factor = self._complete() and not self.words and root and following not in ("", " ")  # 4√2
        self.unknown = self.unknown or factor or (not ends and (self._open() or text == ","))
        self.close_chain(unread=not ends)


def _ends_clause(text: str, before: str, following: str) -> bool:
    """Whether a character that is not read ends a clause: what follows may be read on its own."""
    if text == ",":
        return not (before.isdecimal() and following.isdecimal())  # 203,75
    return text in _CLAUSE_ENDS or (text == "|" and following in ("", " "))


def _equation(left: Sequence[_Term] | None, right: Sequence[_Term] | None) -> Equation | None:
    """Returns the equation left = right, or None.

    None if the left side has fewer than two numbers, or if a side has no value.
    """
    if left is None or right is None:
        return None
    if _excess(left) < 0 or _excess(right) > 0:  # a part of "(4, 3 + 6) = (4, 9)"
        return None
    left, right = _balanced(left), _balanced(right)
    results = [t for t in right if t.text not in _MARKS]
    operands = [t for t in left if t.text not in _MARKS]
    if len(operands) < 2 or not results:
        return None
    if len(results) > 1 and _value(right, False) is None:
        return None
    # "20%" may mean 20 or 0.2: the equation holds if it holds for either.
    holds, part = False, _is_fraction(left)
    rough = _ROUGH if any(t.rough for t in right) else 0.0
    for one, two in product(_alternatives(left), _alternatives(right)):
        for percent, percent_right in product(_readings(one), _readings(two)):
            computed, said = _value(one, percent), _value(two, percent_right)
            if computed is None or said is None:
                return None
            whole = not percent and not percent_right and _whole(one) and _whole(two)
            holds = holds or _close(computed, said, _decimals(two, percent_right), whole)
            holds = holds or abs(computed - said) <= rough * abs(computed)
            part = part and 0 < computed < 1 < said
    if not holds and (part or _mixes_units(left, right) or _mixes_rates(left)):
        return None
    names = tuple(_name(t) for t in operands)
    result = _name(results[0]) if len(results) == 1 else _normal_form(right)
    if len(results) == 1 and right[0].text == "-":
        result = f"-{result}"
    made = tuple(_name(t) for t in results)
    return Equation(f"{_normal_form(left)}={result}", names, result, holds, made)


def _mixes_units(left: Sequence[_Term], right: Sequence[_Term]) -> bool:
    """Whether one unit is turned into another: "1 hour + 30 minutes = 90 minutes".

    A product may have a factor that turns them: "3 feet * 12 inches = 36 inches". Its result is
    in one of their units.
    """
    signs = {t.text for t in (*left, *right) if t.text in _MARKS}
    before, after = ({t.unit for t in side if t.unit is not None} for side in (left, right))
    if signs <= set("*()"):
        return bool({dimension for dimension, _ in before} & {kind for kind, _ in after - before})
    units = before | after
    return len(units) > len({dimension for dimension, _ in units})


def _mixes_rates(terms: Sequence[_Term]) -> bool:
    """Whether a share or rate is added to something else: "$50 - 20% = $40", "$8 each + $2"."""
    kinds = {(t.percent, t.rate) for t in terms if t.text not in _MARKS}
    return len(kinds) > 1 and {t.text for t in terms if t.text in _MARKS} <= set("+-")


def _is_fraction(terms: Sequence[_Term]) -> bool:
    """Whether the expression is a fraction in lowest terms: in "1/4 = 5 cookies" it is a share."""
    signs = [t for t in terms if t.text in _MARKS and t.text not in "()"]
    values = [t.value for t in terms if t.text not in _MARKS]
    whole = all(value.is_integer() for value in values)
    return len(signs) == 1 and signs[0].tight and whole and math.gcd(*map(int, values)) == 1


def _alternatives(terms: list[_Term]) -> list[list[_Term]]:
    """Returns the expression, and what else it may mean: "3 million" 3, "60 / 3/4" 60 / (3/4)."""
    found = [terms]
    if any(t.scale > 1 for t in terms):
        found.append([t._replace(value=t.value / t.scale, scale=1) for t in terms])
    regrouped = _regrouped(terms)
    return found if len(regrouped) == len(terms) else [*found, regrouped]


def _regrouped(terms: Sequence[_Term]) -> list[_Term]:
    """Returns "2000 / 2/3" as "2000 / (2/3)", "6 / 3 * 10^8" as "6 / (3 * 10^8)", others as is."""
    found: list[_Term] = []
    begin = 0
    for i in range(len(terms)):
        size = _divisor(terms[i + 1 : i + 8], terms[i].tight) if terms[i].text == "/" else 0
        if size and i >= begin:
            found += [*terms[begin : i + 1], _Term("("), *terms[i + 1 : i + 1 + size], _Term(")")]
            begin = i + 1 + size
    return [*found, *terms[begin:]]


def _divisor(terms: Sequence[_Term], tight: bool) -> int:
    """Returns how many terms make a divisor in one piece, "2/3" or "3 * 10^-8"; 0 if none do.

    Args:
        terms: the terms behind a sign of division.
        tight: whether this sign has no space beside it: "1/2/3" is no division by 2/3.
    """
    written = "".join(t.text if t.text in _MARKS else "n" for t in terms)
    if written.startswith("n/n") and terms[1].tight and not tight:
        return 3
    power = _POWER_OF_TEN.match(written)
    return len(power.group()) if power and terms[2].text == "10" else 0


def _readings(terms: Sequence[_Term]) -> tuple[bool, ...]:
    """Returns the `percent` values to try in `_value`: both, if the expression has a percentage."""
    return (False, True) if any(term.percent for term in terms) else (False,)


def _whole(terms: Sequence[_Term]) -> bool:
    """Whether the expression has whole numbers and no division, so that its value is exact."""
    written = "".join(term.text for term in terms)
    return not any(mark in written for mark in (".", "/", "^-", "^(-"))


def _decimals(right: Sequence[_Term], percent: bool) -> int | None:
    """Returns to how many decimals the right side may be rounded, None if it must be exact.

    "1.5 * 10^8" may be rounded to -7. 2/5 is no rounded value: 1/2 + 1/3 = 2/5 does not hold.
    """
    results = [t for t in right if t.text not in _MARKS]
    decimals = max(len(t.text.partition(".")[2]) - len(str(t.scale)) + 1 for t in results)
    decimals += 2 * percent
    power = _SCIENTIFIC.fullmatch("".join(t.text for t in right))
    if power:
        return decimals - int(power[1])
    return None if decimals <= 0 and len(results) > 1 else decimals


def _close(computed: float, said: float, decimals: int | None, whole: bool) -> bool:
    """Whether `said` equals `computed`, or is that rounded up or down to `decimals`, if not None.

    A value that needs no rounding must be exact: 0.1 + 0.2 = 0.4 does not hold. `whole`: so must
    sums and products of whole numbers, however large.
    """
    error = abs(computed - said)
    if error <= max(1e-6, (1e-15 if whole else 1e-9) * abs(computed)):
        return True
    if decimals is None:
        return False
    unit = 10.0**-decimals
    rounded = abs(computed - round(computed, decimals)) > 1e-6 * unit
    return rounded and error < unit


def _name(term: _Term) -> str:
    number = parse_number(term.text)
    return term.text if number is None else format_number(number * term.scale)


def _excess(terms: Sequence[_Term]) -> int:
    """Returns how many more brackets open than close."""
    return sum(t.text == "(" for t in terms) - sum(t.text == ")" for t in terms)


def _balanced(terms: Sequence[_Term]) -> list[_Term]:
    """Returns the terms without unmatched brackets at the ends and without signs at the end."""
    first, end = 0, len(terms)
    while end and terms[end - 1].text in _OPEN:
        end -= 1
    excess = _excess(terms[:end])
    while excess > 0 and first < end and terms[first].text == "(":
        first, excess = first + 1, excess - 1
    while excess < 0 and first < end and terms[end - 1].text == ")":
        end, excess = end - 1, excess + 1
    return list(terms[first:end])


def _normal_form(terms: Sequence[_Term]) -> str:
    signs = {t.text for t in terms if t.text in _MARKS}
    names = [t.text if t.text in _MARKS else _name(t) for t in terms]
    if signs in ({"+"}, {"*"}):
        sign = signs.pop()
        return sign.join(sorted(n for n in names if n != sign))
    return "".join(names)


def _value(terms: Sequence[_Term], percent: bool) -> float | None:
    """Returns the value of an expression by precedence climbing, or None if it is malformed.

    Args:
        terms: the expression.
        percent: whether numbers with "%" are divided by 100.
    """
    place = 0

    def peek() -> str:
        return terms[place].text if place < len(terms) else ""

    def factor() -> float:
        nonlocal place
        token = peek()
        place += 1
        if token == "(":
            value = total()
            if peek() != ")":
                raise ValueError
            place += 1
            return value
        if not token or token in "+-*/^)":
            raise ValueError
        term = terms[place - 1]
        return term.value / 100.0 if percent and term.percent else term.value

    def power() -> float:
        nonlocal place
        if peek() == "-":  # -5^2 is -(5^2)
            place += 1
            return -power()
        value = factor()
        if peek() == "^":
            place += 1
            value = math.pow(value, power())
        return value

    def product() -> float:
        nonlocal place
        value = power()
        while peek() and peek() in "*/":
            sign = peek()
            place += 1
            value = value * power() if sign == "*" else value / power()
        return value

    def total() -> float:
        nonlocal place
        value = product()
        while peek() and peek() in "+-":
            sign = peek()
            place += 1
            value = value + product() if sign == "+" else value - product()
        return value

    try:
        value = total()
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return value if place == len(terms) and math.isfinite(value) else None
