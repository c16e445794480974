"""Adds weighted unit gradients into the rows of hidden: the multi-teacher gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_autograd, register_fake
from compact_ops.fused_weights import weighed

_OP = "accumulate_weighted"


def accumulate_weighted(
    unit: Tensor, rows: Tensor, weight: Tensor, group: Tensor | None, num_rows: int
) -> Tensor:
    """Adds up weighted unit gradients: out[rows[m]] += weight[group[m]] * unit[m].

    Deterministic: the terms of a row are added in the order of m, with any number of threads.

    Args:
        unit: [M, H] unit gradients of M tokens.
        rows: [M] int32 or int64, the row of each token, in [0, num_rows). On CUDA the forward
            leaves out a token out of range, because the host does not wait to check it; the
            backward fails on it.
        weight: [G] weight of each group (a group is a rationale). A token of weight 0 adds nothing,
            also if its unit gradient is not finite.
        group: [M] int32 or int64, the group of each token; None means group[m] = m and G = M.
        num_rows: N, the number of rows of the result.

    Returns:
        [N, H] float32 (float64 for float64 `unit`). Differentiable in `unit` and `weight`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        RuntimeError: a row or group is out of range.
    """
    _check.tensor(_OP, "unit", unit, _check.FLOATS, ["M", "H"])
    count = unit.shape[0]
    _check.tensor(_OP, "rows", rows, _check.INTS, ["M"], M=count)
    if group is None:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["M"], M=count)
    else:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["G"])
        _check.tensor(_OP, "group", group, _check.INTS, ["M"], M=count)
    _check.integer(_OP, "num_rows", num_rows, 0)
    _check.together(_OP, unit=unit, rows=rows, weight=weight, group=group)
    if backend() == "reference":
        return reference.accumulate_weighted(unit, rows, weight, group, num_rows)
    out: Tensor = torch.ops.compact.accumulate_weighted(
        unit, rows.long(), weight, None if group is None else group.long(), num_rows
    )
    return out


def _fake(
    unit: Tensor, rows: Tensor, weight: Tensor, group: Tensor | None, num_rows: int
) -> Tensor:
    return unit.new_empty((num_rows, unit.shape[1]), dtype=_check.compute_dtype(unit))


register_fake("compact::accumulate_weighted", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    unit, rows, weight, group, _ = inputs
    ctx.save_for_backward(unit, rows, weight, group)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    unit, rows, weight, group = ctx.saved_tensors
    read = grad[rows]
    scale = weight if group is None else weight[group]
    d_unit = d_weight = None
    if ctx.needs_input_grad[0]:
        d_unit = weighed(read, scale).to(unit.dtype)
    if ctx.needs_input_grad[2]:
        added = unit.masked_fill((scale == 0)[:, None] & ~unit.isfinite(), 0)
        d_weight = (added * read).sum(dim=1)
        if group is not None:
            d_weight = d_weight.new_zeros(weight.shape).index_add(0, group, d_weight)
        d_weight = d_weight.to(weight.dtype)
    return d_unit, None, d_weight, None, None


register_autograd("compact::accumulate_weighted", _backward, _setup_context)
