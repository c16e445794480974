"""Checks of options that a recipe or a caller may set to anything."""

from __future__ import annotations

import math


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
        value: the value; True and False are not numbers.
        least: the lowest value that is allowed, if any.
        above: the value has to be above this.
        most: the highest value that is allowed.
        below: the value has to be below this.
        whole: whether it must be an int.

    Raises:
        ValueError: it is not; the message has name, limits and value.
    """
    kind = int if whole else (int, float)
    if (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    ):
        return
    given = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    limits = " and ".join(f"{word} {limit:g}" for word, limit in given if limit is not None)
    limits = f" of {limits}" if limits.startswith("at ") else f" {limits}".rstrip()
    what = "a whole number" if whole else "a number"
    raise ValueError(f"{name} must be {what}{limits}, got {value!r}")
