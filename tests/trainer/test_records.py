"""Means over the problems of an evaluation, of one process and of several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compact.trainer import NonFiniteError
from compact.trainer.records import EvalMeans, ProblemRecord


def record(nll: list[float], weight: float = 0.5, levels: list[float] | None = None) -> Any:
    count = len(nll)
    weights = [weight] * count
    return ProblemRecord("q", ["a"] * count, [1] * count, weights, nll, {}, {}, levels, [])


def means(*parts: tuple[float, list[Any]]) -> EvalMeans:
    found = EvalMeans()
    for loss, records in parts:
        found.add(loss, records, [SimpleNamespace(counted=True)] * len(records))  # type: ignore[arg-type]
    return found


def test_a_mean_is_over_the_problems_that_have_a_value() -> None:
    without_loss = record([4.0], weight=0.0)
    found = means((3.0, [record([1.0, 3.0]), without_loss]), (1.0, [record([6.0], levels=[-2.0])]))
    found.add(9.0, [record([9.0])], [SimpleNamespace(counted=False)])  # type: ignore[list-item]
    # The first loss is the mean over two problems, of which one has a loss: 6.
    assert found.take(None, alone=True) == {"loss": 3.5, "nll": 4.0, "gold_logp": -2.0}
    assert means((0.0, [without_loss])).take(None, alone=True) == {"nll": 4.0}


def test_ranks_count_by_their_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = means((1.0, [record([1.0])]))
    theirs = means((4.0, [record([4.0], levels=[-1.0]), record([7.0])]))
    told: list[Any] = [None]

    def gather(own: list[Any]) -> list[Any]:
        return [*own, (theirs._means.sums, told[0])]

    monkeypatch.setattr("compact.trainer.records.gather_object", gather)
    assert ours.take(None, alone=False) == {"loss": 3.0, "nll": 4.0, "gold_logp": -1.0}
    told[0] = "the loss is nan"
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        ours.take(None, alone=False)
