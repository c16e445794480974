"""The sparse gradient product: any shape, what the threshold lets through, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact_ops import filtered_matmul
from compact_ops.testing import check


@given(
    st.integers(0, 40),
    st.integers(1, 600),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 2.0, 9.0]),
    st.integers(0, 99),
)
def test_any_shape(rows: int, vocabulary: int, width: int, eps: float, seed: int) -> None:
    """No row, partial vectors, thresholds that let all, some, few and no entries through."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "grad": torch.randn(rows, vocabulary, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "eps": eps,
    }
    check("filtered_matmul", inputs)


def test_the_threshold_itself_counts() -> None:
    """|grad| = eps is used, |grad| below is not, a NaN is never hidden."""
    grad = torch.zeros(2, 40)
    grad[0, 3], grad[0, 20], grad[1, 30] = 0.5, -0.49, torch.nan
    out = filtered_matmul(grad, torch.ones(40, 1), 0.5)
    assert float(out[0]) == 0.5 and bool(out[1].isnan())


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
    """Each refusal names the argument, what was expected and what was found."""
    with pytest.raises(error, match=f"^filtered_matmul: {message}.*got"):
        filtered_matmul(grad, weight, eps)
