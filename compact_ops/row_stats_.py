"""The row kernel on logits one already has: the statistics, and each row becomes its gradient."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference
from compact_ops.types import GoldAnswers, TokenStats

_OP = "row_stats_"


def row_stats_(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    gold: GoldAnswers | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """Statistics of rows of raw logits; each row is overwritten by weight * d nll / d logits."""
    _check.tensor(_OP, "logits", logits, _check.FLOATS, ["R", "V"])
    count = logits.shape[0]
    _check.tensor(_OP, "target", target, _check.INTS, ["R"], R=count)
    if weight is not None:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["R"], R=count)
    if gold is not None:
        _check.gold(_OP, gold, count)
    return reference.row_stats_(
        logits,
        target,
        weight=weight,
        gold=gold,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
