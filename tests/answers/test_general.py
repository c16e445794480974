"""Final answers: read from completions, normalised, compared."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from compact.answers import (
    answers_match,
    extract_answer,
    format_number,
    normalise_answer,
    parse_number,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("7", "7"),
        ("$1,450.0", "1450"),
        ("7 apples", "7"),
        ("-3.50", "-3.5"),
        ("−3", "-3"),
        ("0.250", "0.25"),
        (".5", "0.5"),
        ("3/4", "0.75"),
        ("1/3", "1/3"),
        (r"\frac{3}{4}", "0.75"),
        (r"\boxed{12}", "12"),
        (r"\$18", "18"),
        ("50%", "50"),
        ("(B).", "b"),
        (" Yes, it is. ", "yes, it is"),
        ("12,345,678", "12345678"),
        ("-0", "0"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    """One number becomes that number, anything else its lower-case text."""
    assert normalise_answer(text) == normal
    assert normalise_answer(normal) == normal


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7\nThe answer is 7", "7"),
        ("The answer is 25 x 14 = ? We get it: the answer is 350.", "350"),
        ("So the answer is $1,450.50.", "1450.5"),
        ("The final answer is 3 + 4 = 7 apples.", "7"),
        ("The answer is 7 of the 9 apples.", "7"),
        ("Sum.\n#### 1,234", "1234"),
        (r"Thus \boxed{\frac{1}{2}}", "0.5"),
        ("Answer: (B)", "b"),
        ("The answer is yes. Or no.", "yes"),
        ("We get 3, then 9", "9"),
        ("The answer is 7<|im_end|>", "7"),
        ("No number at all", None),
        ("The answer is", None),
    ],
)
def test_extract(completion: str, answer: str | None) -> None:
    """After the marker, else the last number, else nothing."""
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("7", "7.0", True),
        ("1/3", "0.3333333", True),
        ("1,000", "1000.0005", True),
        ("1048575", "1048576", False),
        ("0.0000001", "0.0000002", False),
        ("7", "8", False),
        ("0", "0.00001", False),
        ("(A)", "a", True),
        ("a", "b", False),
        (None, None, False),
        ("7", None, False),
    ],
)
def test_match(a: str | None, b: str | None, same: bool) -> None:
    """Numbers to a millionth of their size; no answer matches nothing."""
    assert answers_match(a, b) is same
    assert answers_match(b, a) is same


@given(st.fractions(max_denominator=10**6))
def test_number_text_reads_back(number: Fraction) -> None:
    """format_number loses nothing."""
    assert parse_number(format_number(number)) == number


@given(st.decimals(-(10**9), 10**9, places=3))
def test_decimals_have_one_form(number) -> None:
    """Trailing zeros and thousands separators make no difference."""
    plain = normalise_answer(str(number))
    assert normalise_answer(f"{number:,}") == plain
    assert normalise_answer(f"{number}000") == plain
