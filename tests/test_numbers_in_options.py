"""Checks of numbers in options."""

from __future__ import annotations

from typing import Any

import pytest

from compact.options import check_number


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {"least": 0}),
        (0.5, {"above": 0, "most": 1}),
        (1, {"above": 0, "most": 1}),
        (-3.0, {}),
        (2, {"whole": True, "least": 1}),
    ],
)
def test_a_number_within_limits_passes(value: Any, limits: dict[str, Any]) -> None:
    check_number("tau", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (-1, {"least": 0}, "tau must be a number of at least 0, got -1"),
        (0, {"above": 0, "most": 1}, "tau must be a number above 0 and at most 1, got 0"),
        (1.0, {"least": 0, "below": 1}, "tau must be a number of at least 0 and below 1, got 1.0"),
        (2.5, {"whole": True, "least": 1}, "tau must be a whole number of at least 1, got 2.5"),
        (True, {}, "tau must be a number, got True"),
        ("4", {"least": 1}, "tau must be a number of at least 1, got '4'"),
        (float("nan"), {}, "tau must be a number, got nan"),
        (float("inf"), {"least": 0}, "tau must be a number of at least 0, got inf"),
        (None, {}, "tau must be a number, got None"),
    ],
)
def test_anything_else_is_refused(value: Any, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_number("tau", value, **limits)
    assert str(error.value) == message
