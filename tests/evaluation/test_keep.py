"""Filters of `compact score`: expressions, the best of a problem, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact.evaluation.keep import best_of, kept_by


def row(question: str, weight: float, **scores: Any) -> dict[str, Any]:
    return {"question_id": question, "weight": weight, "validity": None, **scores}


ROWS = [row("a", 0.7), row("a", 0.2), row("a", 0.1), row("b", 1.0), row("c", 0.0), row("c", 0.0)]


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("weight > 0.5/K", [1, 1, 0, 1, 0, 0]),
        ("weight >= .2 and K == 3", [1, 1, 0, 0, 0, 0]),
        ("not weight > 0 or weight * K > 2", [1, 0, 0, 0, 1, 1]),
        ("0.05 < weight < 0.5", [0, 1, 1, 0, 0, 0]),
        (" -weight <= -1 ", [0, 0, 0, 1, 0, 0]),
    ],
)
def test_expressions(expression: str, kept: list[int]) -> None:
    assert kept_by(ROWS, expression) == [bool(k) for k in kept]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("weight >", "--keep must be like 'weight > 0.5/K'"),
        ("", "--keep must be like"),
        ("weight", "--keep must be a comparison"),
        ("wieght > 1", "--keep may hold numbers, weight, K, .*got 'wieght'"),
        ("__import__('os').system('x')", "--keep may hold"),
        ("weight.real > 1", "--keep may hold"),
        ("validity > 0.5", "--keep: the rows have no validity"),
        ("weight > 1 / 0", "division by zero"),
        ("'a' == 'a'", "--keep may hold"),
        ("weight ** 9 > 1", "--keep may hold"),
        ("(" * 500 + "weight", "--keep must be like"),
    ],
)
def test_what_is_refused(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_by(ROWS, expression)


def test_the_best_of_a_problem() -> None:
    assert best_of(ROWS, 2) == [True, True, False, True, False, False]
    assert best_of([row("a", 0.5), row("a", 0.5)], 1) == [True, False]
    with pytest.raises(ValueError, match="--top must be at least 1, got 0"):
        best_of(ROWS, 0)


@given(st.text(alphabet="weightK0123456789.+-*/()<>=! andort", max_size=30))
def test_any_text_gives_a_filter_or_one_line(text: str) -> None:
    try:
        assert len(kept_by(ROWS, text)) == len(ROWS)
    except ValueError as error:
        assert "--keep" in str(error)


@pytest.mark.parametrize("text", ["not " * 300 + "weight", "-" * 300 + "1 > 0", "0.5and 1"])
def test_an_expression_of_many_levels(text: str) -> None:
    """Refused: it would end in a RecursionError, or in a warning of Python's."""
    with pytest.raises(ValueError, match="--keep must be like"):
        kept_by([{"question_id": "q", "weight": 0.5}], text)
