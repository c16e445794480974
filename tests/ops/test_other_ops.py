"""The smaller operators against their references, with gradients and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact_ops import (
    accumulate_weighted,
    filtered_matmul,
    pairwise_symmetric_kl,
    problem_weights,
    reference,
    row_stats_,
)


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7), st.integers(0, 99))
def test_accumulate_weighted(count: int, width: int, num_rows: int, seed: int) -> None:
    """Any shape, rows hit many times or never."""
    g = torch.Generator().manual_seed(seed)
    unit, weight = _randn(count, width, seed=seed), _randn(3, seed=seed + 1)
    rows = torch.randint(0, num_rows, (count,), generator=g)
    group = torch.randint(0, 3, (count,), generator=g)
    want = reference.accumulate_weighted(unit, rows, weight, group, num_rows)
    got = accumulate_weighted(unit.float(), rows, weight.float(), group, num_rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_accumulate_weighted_gradients_and_registration() -> None:
    """Differentiable in unit and weight; schema, fake and autograd hold."""
    rows, group = torch.tensor([0, 2, 2, 0]), torch.tensor([1, 0, 1, 1])
    unit, weight = _randn(4, 3).requires_grad_(), _randn(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, w: accumulate_weighted(u, rows, w, group, 3), (unit, weight)
    )
    args = (unit.detach().float(), rows, weight.detach().float(), group, 3)
    torch.library.opcheck(torch.ops.compact.accumulate_weighted.default, args)
    with pytest.raises((ValueError, RuntimeError), match="rows"):
        accumulate_weighted(unit.float(), rows + 1, weight.float(), group, 3)


def test_pairwise_symmetric_kl() -> None:
    """Values and gradients of hidden rows and head; a pair of equal rows is 0."""
    hidden, weight = _randn(9, 6), _randn(300, 6, seed=1)
    left, right = torch.tensor([0, 0, 3, 5, 4]), torch.tensor([1, 2, 8, 5, 0])
    options: dict[str, Any] = {"softcap": 5.0, "logit_scale": 0.5}
    options["bias"] = torch.linspace(-1, 1, 300, dtype=torch.float64)
    upstream = torch.linspace(-1, 1, 5, dtype=torch.float64)
    results = []
    for op, dtype in (
        (reference.pairwise_symmetric_kl, torch.float64),
        (pairwise_symmetric_kl, torch.float64),
        (pairwise_symmetric_kl, torch.float32),
    ):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        kl = op(h, w, left, right, **{k: _as(v, dtype) for k, v in options.items()})
        results.append((kl, *torch.autograd.grad(kl, (h, w), upstream.to(dtype))))
    for got, tolerance in ((results[1], 1e-10), (results[2], 1e-4)):
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert abs(float(results[2][0][3])) < 1e-6


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


@given(st.lists(st.integers(1, 6), max_size=5), st.integers(0, 99), st.sampled_from([0.0, 0.2]))
def test_problem_weights(sizes: list[int], seed: int, floor: float) -> None:
    """Any problems: equal to the reference, sums of 1, and 1 where a problem has one rationale."""
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    scores = _randn(3, sum(sizes), seed=seed)
    beta = torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64)
    prior = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    options = {"tau": 0.7, "floor": floor}
    want = reference.problem_weights(scores, offsets, beta, prior, **options)
    got = problem_weights(scores, offsets, beta, prior, **options)
    torch.testing.assert_close(got, want)
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert float(got[begin:end].sum()) == pytest.approx(1)


def test_row_stats_writes_weighted_unit_gradients() -> None:
    """Logits become weight x d nll / d logits in place; the statistics are those of the head op."""
    logits, target = _randn(7, 501), torch.tensor([3, 500, -100, 0, 17, 4, 4])
    weight = torch.linspace(0, 2, 7, dtype=torch.float64)
    ours, theirs = logits.float(), logits.clone()
    got = row_stats_(ours, target, weight=weight.float())
    want = reference.row_stats_(theirs, target, weight=weight)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.nll.double(), want.nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_filtered_matmul(eps: float) -> None:
    """The product of what passes the threshold."""
    grad, weight = _randn(13, 90), _randn(90, 11, seed=1)
    want = torch.where(grad.abs() >= eps, grad, 0) @ weight
    got = filtered_matmul(grad.float(), weight.float(), eps)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda z: accumulate_weighted(z, torch.zeros(3).long(), z[0], None, 2), "rows must have"),
        (lambda z: filtered_matmul(z, z, 0.0), "weight must have shape"),
        (lambda z: filtered_matmul(z, z.T, -1.0), "eps must"),
        (lambda z: row_stats_(z, torch.zeros(3).long()), "target must have shape"),
        (
            lambda z: problem_weights(z, torch.tensor([0, 4]), z[0], z[0]),
            "must have shape",
        ),
    ],
)
def test_errors(call: Any, message: str) -> None:
    """Each refusal names the argument."""
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 5))
