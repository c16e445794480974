"""Checks of numbers in options."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compact import CompactConfig
from compact.options import check_given, check_number


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (0, {"least": 0}),
        (0.5, {"above": 0, "most": 1}),
        (1, {"above": 0, "most": 1}),
        (-3.0, {}),
        (2, {"whole": True, "least": 1}),
        (np.float32(2.5), {"least": 0, "below": 3}),
        (np.int64(3), {"whole": True, "least": 3}),
        (Fraction(1, 2), {"above": 0}),
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
        (np.float32(2), {"whole": True}, "tau must be a whole number, got np.float32(2.0)"),
        (np.float64("nan"), {}, "tau must be a number, got np.float64(nan)"),
        (np.bool_(True), {}, "tau must be a number, got np.True_"),
    ],
)
def test_anything_else_is_refused(value: Any, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_number("tau", value, **limits)
    assert str(error.value) == message


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_that_no_float_holds(digits: int, whole: bool) -> None:
    for value in (10**digits, -(10**digits)):
        with pytest.raises(ValueError, match=r"^tau must be a number up to 1.8e\+308, got"):
            check_number("tau", value, least=0, whole=whole)


def test_options_that_were_not_given_pass() -> None:
    args = SimpleNamespace(limit=None, seed=3)
    check_given(args, "limit", "seed", least=1)
    with pytest.raises(ValueError, match=r"^--seed must be a number of at least 4, got 3$"):
        check_given(args, "limit", "seed", least=4)


def test_numbers_of_numpy_in_settings_can_be_written() -> None:
    config = CompactConfig("x", overrides={"tau": np.float32(2.5), "beta": [1.0, 0.0, 1.0]})
    assert json.loads(config.to_json_string())["overrides"] == {"tau": 2.5, "beta": [1.0, 0.0, 1.0]}
