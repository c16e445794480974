"""The consistency term on pairs of rows: any shape, equal rows, excluded tokens, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_ops import pairwise_symmetric_kl
from compact_ops.testing import check, head_terms, run


def _inputs(rows: int, width: int, vocabulary: int, pairs: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(rows, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "left": torch.randint(0, rows, (pairs,), generator=g),
        "right": torch.randint(0, rows, (pairs,), generator=g),
    }


@settings(max_examples=40)
@given(
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(1, 600),
    st.integers(0, 30),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(
    rows: int, width: int, vocabulary: int, pairs: int, terms: bool, seed: int
) -> None:
    """No pair, a row in many pairs, a row with itself, a vocabulary of one, every head term."""
    inputs = _inputs(rows, width, vocabulary, pairs, seed)
    # The divergence is a difference of much larger numbers. For some of these few entries torch's
    # own error is small by chance.
    check("pairwise_symmetric_kl", inputs | (head_terms(vocabulary) if terms else {}), ulps=256)


def test_equal_rows_are_0_and_order_does_not_matter() -> None:
    """KL(p, p) = 0 with gradient 0, and left and right may be exchanged."""
    inputs = _inputs(6, 8, 300, 5, 3)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    one = pairwise_symmetric_kl(**inputs)
    two = pairwise_symmetric_kl(inputs["hidden"], inputs["weight"], inputs["right"], inputs["left"])
    torch.testing.assert_close(one, two)
    found = run(pairwise_symmetric_kl, inputs | {"right": inputs["left"]}, ("hidden",))
    assert float(found["out"].abs().max()) < 1e-6
    assert float(found["d_hidden"].abs().max()) < 1e-6


def test_tokens_that_both_exclude() -> None:
    """A bias of -inf removes a token from both softmaxes, as if it were not in the vocabulary."""
    inputs = _inputs(6, 8, 300, 5, 4)
    bias = torch.zeros(300, dtype=torch.float64)
    bias[10:200:3] = -torch.inf
    keep = bias == 0
    with_bias = pairwise_symmetric_kl(**inputs, bias=bias)
    without = pairwise_symmetric_kl(**inputs | {"weight": inputs["weight"][keep]})
    torch.testing.assert_close(with_bias, without)
    found = check("pairwise_symmetric_kl", inputs | {"bias": bias}, ulps=256)
    assert all(bool(x.isfinite().all()) for x in found.values())


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"left": torch.zeros(4).long()}, ValueError, r"right must have shape \[P\] = \[4\]"),
        ({"left": torch.zeros(5)}, TypeError, "left must have dtype int64 or int32"),
        (
            {"left": torch.zeros(5, dtype=torch.int64, device="meta")},
            ValueError,
            "left must be on cpu",
        ),
        ({"hidden": torch.zeros(6)}, ValueError, "hidden must have shape"),
        ({"weight": torch.zeros(30, 7)}, ValueError, r"weight must have shape \[V, H\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight must have at least one row"),
        ({"bias": torch.zeros(29)}, ValueError, "bias must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    with pytest.raises(error, match=f"^pairwise_symmetric_kl: {message}.*got"):
        pairwise_symmetric_kl(**_inputs(6, 8, 30, 5, 0) | change)


@pytest.mark.parametrize("name", ["grad", "kl_left", "kl_right", "lse_left", "lse_right"])
def test_a_vector_that_does_not_fit_the_pairs(name: str) -> None:
    """The backward names it."""
    inputs = _inputs(6, 8, 30, 5, 0)
    vectors = {n: torch.zeros(5) for n in ("grad", "kl_left", "kl_right", "lse_left", "lse_right")}
    grad, *stats = (vectors | {name: torch.zeros(4)}).values()
    backward = torch.ops.compact.pairwise_symmetric_kl_backward
    with pytest.raises(RuntimeError, match=f"{name} must have size 5 at dimension 0, got 4"):
        backward(grad, *inputs.values(), None, *stats, 0.0, 1.0, True, True, False)


def test_row_out_of_range() -> None:
    """A row out of range raises an error that names it; nothing is read."""
    inputs = _inputs(6, 8, 30, 5, 0)
    inputs["left"][4] = 6
    with pytest.raises((ValueError, RuntimeError), match=r"left\[4\] must be in \[0, 6\), got 6"):
        pairwise_symmetric_kl(**inputs)
