"""Numbers in text: finding, parsing and writing them, exactly."""

from __future__ import annotations

import re
from fractions import Fraction

# A number: optional sign, thousands separators, decimals, or a plain fraction such as 3/4.
NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?<=\d)(?![\d])")


def parse_number(text: str) -> Fraction | None:
    """Returns the number that `text` is ("1,450.0", "-3", "3/4"), exactly, or None."""
    plain = text.strip().replace(",", "").replace("−", "-")
    try:
        return Fraction(*(Fraction(part) for part in plain.split("/", 1)))
    except (ValueError, ZeroDivisionError):
        return None


def format_number(number: Fraction) -> str:
    """Returns the one text of a number: 1450, 0.25, or 1/3 where no decimal is exact."""
    if number.denominator == 1:
        return str(number.numerator)
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    digits = 1
    while (number * 10**digits).denominator != 1:
        digits += 1
    scaled = str(abs(int(number * 10**digits))).zfill(digits + 1)
    return f"{'-' if number < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"
