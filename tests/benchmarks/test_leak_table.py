"""Intervals in the table of `benchmarks.leaks`."""

import pytest

from benchmarks.leaks import share
from compact.lab.leaks import KINDS


def test_a_share_of_one_has_an_interval():
    def row(**scores):
        return {"scores": {"gain": [scores.get(kind.replace("-", "_"), 0.0) for kind in KINDS]}}

    won, half = share([row(gold=1.0)] * 40, "gain", "gold", "vacuous")
    assert won == 1.0 and half == pytest.approx(1 - 0.05 ** (1 / 40))
    won, half = share([row(gold=1.0), row(vacuous=1.0), row()], "gain", "gold", "vacuous")
    assert won == 0.5  # won, lost and a tie
    assert half == pytest.approx(4.303 * 0.5 / 3**0.5, rel=1e-3)
