"""Checks of options that a recipe or a caller may set to anything."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Checks that a value is a finite number within limits.

    Args:
        name: what the message calls it, such as "tau of trico".
        value: the value, also one of NumPy; True and False are not numbers.
        least: the lowest value that is allowed, if any.
        above: the value has to be above this.
        most: the highest value that is allowed.
        below: the value has to be below this.
        whole: whether it must be a whole number.

    Raises:
        ValueError: it is not; the message has name, limits and value.
    """
    numeric = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    number: Any = value if numeric else math.nan
    try:
        finite = math.isfinite(number)
    except OverflowError:
        largest = f"{sys.float_info.max:.2g}"
        raise ValueError(f"{name} must be a number up to {largest}, got a larger one") from None
    if (
        finite
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    ):
        return
    given = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    limits = " and ".join(f"{word} {limit:g}" for word, limit in given if limit is not None)
    limits = f" of {limits}" if limits.startswith("at ") else f" {limits}".rstrip()
    what = "a whole number" if whole else "a number"
    raise ValueError(f"{name} must be {what}{limits}, got {value!r}")


def check_given(args: object, *names: str, **limits: Any) -> None:
    """Checks options of a command line, as `check_number`; those that are None were not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None:
            check_number(f"--{name}", value, **limits)


def check_numbers(config: Any, limits: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks fields of a dataclass as `check_number`, and turns numbers of NumPy into plain ones.

    Args:
        config: the dataclass. None is allowed where it is the default.
        limits: field -> the keyword arguments of `check_number`.
    """
    optional = {field.name for field in fields(config) if field.default is None}
    for name, limit in limits.items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        check_number(name, value, **limit)
        if hasattr(value, "item"):  # JSON has no numbers of NumPy
            setattr(config, name, value.item())
