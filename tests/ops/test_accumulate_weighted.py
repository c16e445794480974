"""The multi-teacher gradient accumulation: any shape, order of the sum, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compact_ops import accumulate_weighted, reference
from compact_ops.testing import check


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_any_shape(count: int, width: int, num_rows: int, grouped: bool, seed: int) -> None:
    """Rows with many tokens or none, an input without tokens, with and without groups."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "unit": torch.randn(count, width, generator=g, dtype=torch.float64),
        "rows": torch.randint(0, num_rows, (count,), generator=g),
        "weight": torch.randn(3 if grouped else count, generator=g, dtype=torch.float64),
        "group": torch.randint(0, 3, (count,), generator=g) if grouped else None,
        "num_rows": num_rows,
    }
    check("accumulate_weighted", inputs)


def test_terms_are_added_in_order() -> None:
    """A row's sum follows the order of the tokens: 1e8 + 1 - 1e8 is 0 in float32."""
    unit = torch.tensor([[1e8], [1.0], [-1e8]])
    out = accumulate_weighted(unit, torch.zeros(3).long(), torch.ones(3), None, 1)
    assert float(out) == 0


@pytest.mark.parametrize("function", [accumulate_weighted, reference.accumulate_weighted])
def test_a_token_of_weight_0_adds_nothing(function: Callable[..., Tensor]) -> None:
    """Also if its unit gradient is not finite. The gradient of its weight is that of the sum."""
    unit = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 4.0]])
    weight = torch.tensor([2.0, 0.0, 0.0], requires_grad=True)
    out = function(unit.requires_grad_(), torch.tensor([0, 0, 1]), weight, None, 2)
    assert out.tolist() == [[2, 4], [0, 0]]
    out.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3, 0, 7]
    assert unit.grad is not None and unit.grad.tolist() == [[2, 2], [0, 0], [0, 0]]


def test_expanded_weight() -> None:
    """One number for all groups, as a tensor of stride 0."""
    unit, rows = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])
    out = accumulate_weighted(unit, rows, torch.tensor(0.5).expand(4), None, 2)
    assert torch.equal(out, torch.ones(2, 2))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"unit": torch.zeros(4)}, ValueError, r"unit must have shape \[M, H\]"),
        ({"unit": [0.0]}, TypeError, "unit must be a Tensor"),
        ({"rows": torch.zeros(3).long()}, ValueError, r"rows must have shape \[M\] = \[4\]"),
        ({"rows": torch.zeros(4)}, TypeError, "rows must have dtype int64 or int32"),
        ({"weight": torch.zeros(2, 2)}, ValueError, "weight must have shape"),
        ({"group": torch.zeros(5).long()}, ValueError, "group must have shape"),
        ({"num_rows": -1}, ValueError, "num_rows must be >= 0"),
        ({"num_rows": 2.0}, TypeError, "num_rows must be an integer"),
        ({"group": None}, ValueError, r"weight must have shape \[M\] = \[4\]"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    inputs: dict[str, Any] = {
        "unit": torch.zeros(4, 2),
        "rows": torch.zeros(4).long(),
        "weight": torch.zeros(3),
        "group": torch.zeros(4).long(),
        "num_rows": 2,
    }
    with pytest.raises(error, match=f"^accumulate_weighted: {message}.*got"):
        accumulate_weighted(**inputs | change)


@pytest.mark.parametrize("name,bad", [("rows", 2), ("rows", -1), ("group", 3)])
def test_index_out_of_range(name: str, bad: int) -> None:
    """An index out of range raises an error that names it; nothing is written."""
    index = {"rows": torch.zeros(4).long(), "group": torch.zeros(4).long()}
    index[name][2] = bad
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}\[2\] must be in .* got {bad}"):
        accumulate_weighted(torch.zeros(4, 2), index["rows"], torch.zeros(3), index["group"], 2)


@pytest.mark.parametrize("empty", ["rows", "group"])
def test_no_index_is_in_an_empty_range(empty: str) -> None:
    """With no rows, index 0 is out of range too."""
    inputs = {"unit": torch.ones(1, 2), "rows": torch.tensor([0]), "weight": torch.ones(1)}
    inputs |= {"num_rows": 0} if empty == "rows" else {"num_rows": 1, "weight": torch.ones(0)}
    group = None if empty == "rows" else torch.tensor([0])
    with pytest.raises(RuntimeError, match=rf"{empty}\[0\] must be in \[0, 0\), got 0"):
        accumulate_weighted(**inputs, group=group)
