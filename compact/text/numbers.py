"""Finds numbers in English text, and converts them to exact values and to a normal form."""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"

# A number: optional sign, thousands separators, decimals, a fraction (3/4, 3⁄4), a mixed number
# (1 1/2), an exponent (1.5e-3). Parts of a date (05/01/2020), of a time or ratio (3:30), and of a
# version or section number (1.2.3) are not numbers. Scripts without spaces may stand before one.
NUMBER = re.compile(
    r"(?<![A-Za-z\u00c0-\u024f\d_.])(?<!\d[:/⁄])[-−–]?"
    r"(?:\d{1,6}[ ]\d{1,6}[/⁄]\d{1,6}"
    rf"|{_WHOLE}?(?:\.\d+)?(?:[/⁄]\d+|[eE][-+]?\d+)?)"
    r"(?<=\d)(?!\d)(?![:/⁄.]\d)"
)

_PARTS = re.compile(
    rf"(?P<sign>[-+−–]?)(?:(?P<whole>{_WHOLE}) +(?=\d+[/⁄]\d))?"
    rf"(?P<top>{_WHOLE}?(?:\.\d*)?)(?:[eE](?P<exponent>[-+]?\d{{1,4}}))?"
    r"(?:[/⁄](?P<bottom>\d+(?:\.\d*)?|\.\d+))?"
)
MAX_DIGITS = 1000
"""Most characters of a text that is read as a number."""
MAX_EXPONENT = 400
"""Largest absolute exponent of a number: "1e9999999999" is text, not a number."""


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of `text` if it is a number, else None.

    Examples of numbers are "1,450.0", "-3", "3/4", "1 1/2" and "1.5e-3". A text with more than
    `MAX_DIGITS` characters or an exponent beyond `MAX_EXPONENT` is not a number, to limit the size
    of the value.
    """
    plain = text.strip()
    found = _PARTS.fullmatch(plain) if len(plain) <= MAX_DIGITS else None
    if not found or not any(digit.isdigit() for digit in found["top"]):
        return None
    exponent = int(found["exponent"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(found["top"].replace(",", "")) * Fraction(10) ** exponent
    if found["bottom"]:
        bottom = Fraction(found["bottom"])
        if bottom == 0:
            return None
        value /= bottom
    if found["whole"]:
        value += int(found["whole"].replace(",", ""))
    return -value if found["sign"] in ("-", "−", "–") else value


def format_number(number: Fraction) -> str:
    """Returns the normal form of a number: 1450, 0.25, or 1/3 if no decimal is exact."""
    if number.denominator == 1:
        return str(number.numerator)
    rest, digits = number.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest //= prime
            power += 1
        digits = max(digits, power)
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    scaled = str(abs(int(number * 10**digits))).zfill(digits + 1)
    return f"{'-' if number < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


_SMALL = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: i for i, word in enumerate(_SMALL)}
_VALUES |= {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 1000}
_SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
_WORD = "|".join(sorted([*_VALUES, *_SCALES], key=len, reverse=True))

NUMBER_WORDS = re.compile(
    rf"\b(?:{_WORD})(?:(?:[ -]|[ ]and[ ])(?:{_WORD})){{0,12}}\b", re.IGNORECASE
)
"""A number in words: "six", "twenty-five", "three hundred and two"."""


def parse_number_words(text: str) -> Fraction | None:
    """Returns the number that `text` gives in words, or None: "one hundred and five" is 105."""
    words = text.lower().replace("-", " ").split()
    if not words or len(words) > 20:
        return None
    total = part = 0
    for word in words:
        if word == "and":
            continue
        if word in _VALUES:
            part += _VALUES[word]
        elif word == "hundred":
            part = max(part, 1) * 100
        elif word in _SCALES:
            total += max(part, 1) * _SCALES[word]
            part = 0
        else:
            return None
    return Fraction(total + part)


_VULGAR = re.compile("[¼-¾⅐-⅞]")


def plain_fractions(text: str) -> str:
    """Writes fractions of one character as a/b: "½" becomes "1/2", and "1½" becomes "1 1/2"."""

    def as_ratio(found: re.Match[str]) -> str:
        before = text[found.start() - 1 : found.start()] if found.start() else ""
        ratio = unicodedata.normalize("NFKC", found.group()).replace("⁄", "/")
        return f" {ratio}" if before.isdigit() else ratio

    return _VULGAR.sub(as_ratio, text)


SCALE = rf"(?:[ ](?:{'|'.join(_SCALES)})){{1,3}}\b"
"""The words behind a number that multiply it: "5 million", "3 hundred thousand"."""


def scale_of(words: str | None) -> int:
    """Returns what `SCALE` multiplies by; 1 without such words."""
    return math.prod(_SCALES[word] for word in (words or "").split())


_SHORT_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9}
_SCALED = re.compile(
    rf"(?P<number>{NUMBER.pattern})(?:(?P<words>{SCALE})"
    r"| ?(?P<letter>[kKmMB])\b)"
)
_IS_SCALED = re.compile(rf"(?<=\d)(?: (?:{'|'.join(_SCALES)})| ?[kKmMB])\b")


def without_scales(text: str) -> str:
    """Writes "5 million" and "$120k" in digits; a letter counts after a sum of money only."""
    if not _IS_SCALED.search(text):
        return text

    def in_digits(found: re.Match[str]) -> str:
        number = parse_number(found["number"])
        money = found.string[: found.start()].endswith(("$", "€", "£", "¥"))
        if number is None or not (found["words"] or money):
            return found.group()
        letter = _SHORT_SCALES.get((found["letter"] or "").lower(), 1)
        return format_number(number * scale_of(found["words"]) * letter)

    return _SCALED.sub(in_digits, text)


_NAMED = {"dozen": 12, "half": 2, "halve": 2, "quarter": 4, "once": 1, "twice": 2, "thrice": 3}
_NAMED |= {"double": 2, "triple": 3, "quadruple": 4}
_IN_WORDS = re.compile(
    rf"{NUMBER_WORDS.pattern}|\b(?P<named>{'|'.join(_NAMED)})[sd]?\b"
    rf"|(?<![\w.])(?P<before>\d{{1,9}}(?:\.\d{{1,9}})?)(?:-(?=[a-z])|(?={SCALE}))",
    re.IGNORECASE,
)


def numbers_in_words(text: str) -> tuple[str, ...]:
    """Returns the numbers that a text gives in words or before a hyphen, in normal form.

    "twenty-five", "a dozen" (12), "half" (2, what it divides by), "a 6-ounce cup" (6), "2.5
    million" (2.5).
    """
    found: dict[str, None] = {}
    for match in _IN_WORDS.finditer(text):
        if match["before"]:
            number: Fraction | None = Fraction(match["before"])
        elif match["named"]:
            number = Fraction(_NAMED[match["named"].lower()])
        else:
            number = parse_number_words(match.group())
        if number is not None:
            found[format_number(number)] = None
    return tuple(found)


_PARTS_OF_ONE = {"half": 2, "halves": 2, "halved": 2, "quarter": 4, "third": 3, "fourth": 4}
_PARTS_OF_ONE |= {"fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10}
_FRACTION = re.compile(
    r"(?<![\d/⁄.])(?:(?P<whole>\d{1,6}) )?(?P<top>\d{1,6})[/⁄](?P<bottom>\d{1,6})(?![\d/⁄])"
    rf"|\b(?:(?P<count>an?|{_WORD})[ -])?(?P<part>{'|'.join(_PARTS_OF_ONE)})s?\b(?P<of>\sof\b)?",
    re.IGNORECASE,
)


def fractions_of(text: str) -> tuple[Fraction, ...]:
    """Returns the fractions in a text, such as "3/4", "1 1/2", "half" and "two thirds".

    "Third" and the like count only after a number or before "of", so not in "the third day". A
    fraction that is 0 is left out.
    """
    found: dict[Fraction, None] = {}
    for match in _FRACTION.finditer(plain_fractions(text)):
        if match["top"]:
            number = parse_number(match.group())
        elif match["count"] or match["of"] or match["part"].lower() in ("half", "halved"):
            count = parse_number_words(match["count"] or "") or Fraction(1)
            number = count / _PARTS_OF_ONE[match["part"].lower()]
        else:
            number = None
        if number:
            found[number] = None
    return tuple(found)
