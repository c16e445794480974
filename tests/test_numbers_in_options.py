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
from compact.settings import ComparisonConfig, RecipeConfig


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


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("max_length", 100.5, "a whole number of at least 2"),
        ("max_length", 512.0, "a whole number of at least 2"),
        ("max_length", None, "a whole number of at least 2"),
        ("per_device_train_batch_size", 2.5, "a whole number of at least 1"),
        ("leaf_every", 1.5, "a whole number of at least 1"),
        ("leaf_every", True, "a whole number of at least 1"),
        ("max_rationales_per_problem", 1.5, "a whole number of at least 1"),
        ("leaf_budget", True, "a number above 0"),
        ("filter_eps", 1, "a number of at least 0 and below 1"),
        ("save_steps", 0, "a number above 0"),
        ("num_train_epochs", 0, "a number above 0"),
    ],
)
def test_a_setting_is_refused_as_any_number(name: str, value: Any, limits: str) -> None:
    with pytest.raises(ValueError) as error:
        CompactConfig("x", **{name: value})
    assert str(error.value) == f"{name} must be {limits}, got {value!r}"


def test_settings_may_be_numbers_of_numpy() -> None:
    whole = {"max_length": 512, "leaf_every": 2, "gradient_accumulation_steps": 3, "seed": 4}
    config = CompactConfig(
        "x", **{k: np.int64(v) for k, v in whole.items()}, learning_rate=np.float64(0.5)
    )
    written = json.loads(config.to_json_string())
    assert {name: written[name] for name in whole} == whole and written["learning_rate"] == 0.5


def test_shares_of_all_steps_pass() -> None:
    shares = {"save_steps": 0.25, "logging_steps": 0.5, "warmup_steps": 0.1}
    config = CompactConfig("x", **shares)
    assert {name: getattr(config, name) for name in shares} == shares


@pytest.mark.parametrize("of", [RecipeConfig, ComparisonConfig])
def test_keys_of_a_recipe_are_checked_alike(of: type) -> None:
    name = "max_problems" if of is RecipeConfig else "tokens"
    assert getattr(of(**{name: np.int64(3)}), name) == 3
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number of at least 1, got 2.5"):
        of(**{name: 2.5})
