"""Refuses data without gold answers for weighers that cannot work without them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from compact.data import Problem
from compact.weighting.weighers import Weigher, make_weigher, weigher_names

logger = logging.getLogger(__name__)


def check_gold(weigher: Weigher, problems: Sequence[Problem]) -> None:
    """Checks that a weigher has the gold answers that it reads; warns if some are missing.

    Raises:
        ValueError: no problem has a gold answer, and the weigher reads it. The message names what
            reads it, and what works without.
    """
    without = sum(problem.answer is None for problem in problems)
    if not weigher.gold_readers or not without:
        return
    reader = weigher.gold_readers[0]
    what = weigher.name if reader == weigher.name else f"{reader} of {weigher.name}"
    if without == len(problems):
        raise ValueError(
            f"preset: {what} needs gold answers, and no row of the data has the field 'answer'; "
            f"these need none: {', '.join(_without_gold())}"
        )
    logger.warning("%s: %d of %d problems have no gold answer", what, without, len(problems))


def _without_gold() -> list[str]:
    """Returns the presets and policies that need no gold answers, and no settings either."""
    found = []
    for name in weigher_names():
        with suppress(ValueError):  # it cannot be made without settings
            if not make_weigher(name).gold_readers:
                found.append(name)
    return found
