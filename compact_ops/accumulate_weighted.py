"""Weighted accumulation of unit gradients into hidden rows: the multi-teacher gradient."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference

_OP = "accumulate_weighted"


def accumulate_weighted(
    unit: Tensor, rows: Tensor, weight: Tensor, group: Tensor | None, num_rows: int
) -> Tensor:
    """out[rows[m]] += weight[group[m]] * unit[m], deterministic."""
    _check.tensor(_OP, "unit", unit, _check.FLOATS, ["M", "H"])
    count = unit.shape[0]
    _check.tensor(_OP, "rows", rows, _check.INTS, ["M"], M=count)
    if group is None:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["M"], M=count)
    else:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["G"])
        _check.tensor(_OP, "group", group, _check.INTS, ["M"], M=count)
    return reference.accumulate_weighted(unit, rows, weight, group, num_rows)
