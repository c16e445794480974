"""The tolerance rule itself: it accepts right results and finds planted errors."""

from __future__ import annotations

import pytest
import torch

import compact_ops
from compact_ops import testing
from compact_ops.testing import SAMPLES, compare


def test_a_sample_for_every_operator() -> None:
    """Every public operator of the package has an entry."""
    public = {n for n in compact_ops.__all__ if n.islower() and "backend" not in n}
    assert set(SAMPLES) == public


def test_the_worst_entry_is_named() -> None:
    """The message has the output's name, the index, both values and the allowance."""
    truth = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    theirs, got = truth.float(), truth.float()
    compare("y", got, theirs, truth)
    got[1, 2] += 0.5
    with pytest.raises(AssertionError, match=r"y: wrong at \[1, 2\]: got 6.5, expected 6.0"):
        compare("y", got, theirs, truth)


def test_twice_the_error_of_torch_is_allowed() -> None:
    """An error of 1.9 times torch's largest passes, 2.1 times fails."""
    truth = torch.zeros(5, dtype=torch.float64)
    theirs = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0])
    compare("y", 1.9 * theirs.flip(0), theirs, truth)
    with pytest.raises(AssertionError, match="wrong at"):
        compare("y", 2.1 * theirs.flip(0), theirs, truth)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_fails_unless_it_is_true(bad: float) -> None:
    """A NaN or an infinity passes only where float64 has the same."""
    truth = torch.tensor([0.0, bad], dtype=torch.float64)
    compare("y", truth.float(), truth.float(), truth)
    with pytest.raises(AssertionError, match=r"wrong at \[0\]"):
        compare("y", torch.tensor([bad, bad]), truth.float(), truth)
    with pytest.raises(AssertionError, match=r"wrong at \[1\]"):
        compare("y", torch.zeros(2), truth.float(), truth)


def test_check_finds_a_planted_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator whose gradient is off by a thousandth does not pass."""
    inputs = SAMPLES["filtered_matmul"].make(0, 9)
    testing.check("filtered_matmul", inputs)
    right = compact_ops.filtered_matmul
    monkeypatch.setattr(
        compact_ops, "filtered_matmul", lambda grad, weight, eps: right(grad, weight, eps) * 1.001
    )
    with pytest.raises(AssertionError, match="filtered_matmul: out: wrong at"):
        testing.check("filtered_matmul", inputs)


def test_check_finds_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result has the dtype of the reference's."""
    right = compact_ops.filtered_matmul
    monkeypatch.setattr(compact_ops, "filtered_matmul", lambda *a, **k: right(*a, **k).double())
    with pytest.raises(
        AssertionError, match="out must have dtype torch.float32, got torch.float64"
    ):
        testing.check("filtered_matmul", SAMPLES["filtered_matmul"].make(0, 9))


def test_opcheck_wants_a_native_call() -> None:
    """Code that calls no operator of the package raises an error."""
    with pytest.raises(AssertionError, match="no operator of compact_ops was called"):
        testing.opcheck(torch.sin, {"input": torch.zeros(2)})
