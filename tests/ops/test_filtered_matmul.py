"""The sparse gradient product: any shape, effect of the threshold, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact_ops import filtered_matmul, reference
from compact_ops.testing import check


@given(
    st.integers(0, 40),
    st.integers(1, 600),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 2.0, 8.0]),  # powers of two: float32 rounds as float64 does
    st.integers(0, 99),
)
def test_any_shape(rows: int, vocabulary: int, width: int, eps: float, seed: int) -> None:
    """No row, partial vectors, and thresholds that keep all, most, few and no entries."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "grad": torch.randn(rows, vocabulary, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "eps": eps,
    }
    check("filtered_matmul", inputs)


def test_what_is_never_rounded() -> None:
    """|grad| >= eps is unchanged, 0 stays 0, NaN stays NaN."""
    grad = torch.zeros(3, 40)
    grad[0, 3], grad[0, 20], grad[1, 30] = 0.5, -0.75, torch.nan
    out = filtered_matmul(grad, torch.eye(40), 0.5)
    assert torch.equal(out[0], grad[0]) and bool(out[1].isnan().all())
    assert float(out[2].abs().sum()) == 0


@pytest.mark.parametrize("entry", [1e-6, 1e-5, 1e-4, -2e-4])
def test_rounding_is_unbiased(entry: float) -> None:
    """The mean is kept: of unlike entries, of one entry in all columns, of a column's entries."""
    eps, rows, columns = 2.0**-12, 400, 1000
    g = torch.Generator().manual_seed(0)
    unlike = entry * (0.9 + 0.2 * torch.rand(rows, columns, generator=g))
    for grad in (unlike, torch.full((1, columns), entry), unlike[:, :1]):
        counted = filtered_matmul(grad, torch.eye(grad.shape[1]), eps)
        assert set(counted.abs().unique().tolist()) <= {0.0, eps}
        spread = eps * (abs(entry) / eps / grad.numel()) ** 0.5
        assert abs(float((counted - grad).mean())) < 4 * spread


def test_second_derivative() -> None:
    """Small entries count in it as in the exact product; the kernel's agrees with the reference."""
    g = torch.Generator().manual_seed(0)
    grad, weight, d_weight = (torch.randn(n, generator=g) for n in ((5, 30), (30, 4), (30, 4)))
    found = []
    for function in (filtered_matmul, reference.filtered_matmul):
        leaves = grad.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(*leaves, 1.0).square().sum()
        (first,) = torch.autograd.grad(out, leaves[1], create_graph=True)
        found.append(torch.autograd.grad((first * d_weight).sum(), leaves[0])[0])
    torch.testing.assert_close(*found)
    assert int((found[0] == 0).sum()) == 0


@pytest.mark.parametrize(
    "grad,weight,eps,error,message",
    [
        (torch.zeros(4), torch.zeros(5, 2), 0.0, ValueError, "grad must have shape"),
        (torch.zeros(4, 5).long(), torch.zeros(5, 2), 0.0, TypeError, "grad must have dtype"),
        (torch.zeros(4, 5), torch.zeros(4, 2), 0.0, ValueError, "weight must have shape"),
        (torch.zeros(4, 5), torch.zeros(5, 2), -1.0, ValueError, "eps must be >= 0"),
        (torch.zeros(4, 5), torch.zeros(5, 2), float("nan"), ValueError, "eps must be >= 0"),
    ],
)
def test_errors(
    grad: torch.Tensor, weight: torch.Tensor, eps: float, error: type[Exception], message: str
) -> None:
    """Each error names the argument, what was expected and what was found."""
    with pytest.raises(error, match=f"^filtered_matmul: {message}.*got"):
        filtered_matmul(grad, weight, eps)
