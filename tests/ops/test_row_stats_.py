"""The row kernel on given logits: any shape, weights of 0, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_ops import reference, row_stats_
from compact_ops.testing import check, head_inputs, head_terms


def _inputs(rows: int, vocabulary: int, seed: int, scale: float = 1.0) -> dict[str, Any]:
    head = head_inputs(seed, tokens=rows, vocabulary=vocabulary)
    return {
        "logits": scale * head["hidden"] @ head["weight"].T,
        "target": head["target"],
        "weight": torch.linspace(0, 2, rows, dtype=torch.float64),
        "gold": head["gold"],
    }


@settings(max_examples=40)
@given(
    st.integers(0, 20),
    st.sampled_from([1, 2, 255, 4095, 4096, 4097, 9000]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_any_shape(rows: int, vocabulary: int, terms: bool, dtype: torch.dtype, seed: int) -> None:
    """Vocabularies close to the piece size, no row, every head term, every dtype."""
    inputs = _inputs(rows, vocabulary, seed) | (head_terms(vocabulary) if terms else {})
    check("row_stats_", inputs, dtype)


def test_huge_logits() -> None:
    """Logits of hundreds neither overflow nor lose the entropy."""
    check("row_stats_", _inputs(9, 700, 1, scale=100.0))


@pytest.mark.parametrize("function", [row_stats_, reference.row_stats_])
def test_weight_0_leaves_a_row_of_zeros(function: Any) -> None:
    """An ignored token adds nothing, also if the row's logits are infinite."""
    logits = torch.full((2, 50), torch.inf)
    logits[1] = torch.linspace(0, 1, 50)
    function(logits, torch.tensor([3, 4]), weight=torch.tensor([0.0, 1.0]))
    assert float(logits[0].abs().max()) == 0 and float(logits[1, 4]) < 0


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits must have shape \[R, V\]"),
        ({"logits": torch.zeros(50, 3).T}, ValueError, "logits must be contiguous"),
        ({"logits": torch.zeros(3, 50).long()}, TypeError, "logits must have dtype"),
        ({"target": torch.zeros(4).long()}, ValueError, r"target must have shape \[R\] = \[3\]"),
        ({"weight": torch.zeros(2)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(49)}, ValueError, "bias must have shape"),
        ({"softcap": -2.0}, ValueError, "softcap must be > 0"),
        ({"logit_scale": -torch.inf}, ValueError, "logit_scale must be finite"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        ({"gold": 3}, TypeError, "gold must be a GoldAnswers"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    inputs = {"logits": torch.zeros(3, 50), "target": torch.zeros(3).long()}
    with pytest.raises(error, match=f"^row_stats_: {message}.*got"):
        row_stats_(**inputs | change)


def test_a_graph_that_saved_the_logits_raises() -> None:
    """Its backward would read the gradients that are there now."""
    logits, factor = torch.rand(3, 50), torch.ones(3, 50, requires_grad=True)
    product = (logits * factor).sum()
    row_stats_(logits, torch.zeros(3).long())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_logits_with_a_gradient() -> None:
    """Logits that require a gradient raise an error, because the call overwrites them."""
    logits = torch.zeros(3, 50, requires_grad=True)
    with pytest.raises(ValueError, match="logits must not require a gradient"):
        row_stats_(logits, torch.zeros(3).long())
