"""Statistics and gradients of the LM head for a list of tokens, never holding their logits."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference
from compact_ops.types import GoldAnswers, TokenStats

_OP = "linear_token_stats"


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    gold: GoldAnswers | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    head_grad: str = "auto",
    filter_eps: float = 0.0,
) -> TokenStats:
    """Statistics of z = softcap(logit_scale * hidden @ weight.T + bias) for M targets."""
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    num_rows = hidden.shape[0]
    if rows is None:
        count = num_rows
    else:
        _check.tensor(_OP, "rows", rows, _check.INTS, ["M"])
        count = rows.shape[0]
    _check.tensor(_OP, "target", target, _check.INTS, ["M"], M=count)
    _check.number(_OP, "filter_eps", filter_eps, 0, inclusive=True)
    if gold is not None:
        _check.gold(_OP, gold, count)
    _check.same_device(_OP, hidden=hidden, weight=weight, target=target, rows=rows, bias=bias)
    return reference.linear_token_stats(
        hidden,
        weight,
        target,
        rows=rows,
        gold=gold,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
