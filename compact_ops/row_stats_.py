"""Statistics of rows of given logits; each row is overwritten by its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, empty_statistics, register_fake
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
    """Returns statistics of raw logits; overwrites row r by weight[r] * d nll[r] / d logits[r].

    z = softcap(logit_scale * logits + bias). The gradient includes the derivatives of softcap and
    logit_scale, so afterwards d hidden = logits @ head and d head = logits.T @ hidden. Autograd
    records nothing of this call.

    Args:
        logits: [R, V] contiguous, of any float dtype, the product hidden @ head.T; overwritten.
        target: [R] int32 or int64 token ids.
        weight: [R] factor of each row's gradient; None means 1. With 0 the row becomes 0, also if
            its logits are not finite.
        gold: the gold answers; gives gold_logit and gold_logp of every row.
        bias: [V] or None.
        softcap: c of c * tanh(x / c), or None.
        logit_scale: multiplies `logits`.
        ignore_index: rows with this target have nll 0, correct False and gradient 0.

    Returns:
        TokenStats of [R] tensors.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value; logits are not contiguous or
            require a gradient.
        RuntimeError: a target or id is out of range, or a token has no gold answer.
    """
    _check.tensor(_OP, "logits", logits, _check.FLOATS, ["R", "V"])
    count, vocabulary = logits.shape
    _check.tensor(_OP, "target", target, _check.INTS, ["R"], R=count)
    if weight is not None:
        _check.tensor(_OP, "weight", weight, _check.FLOATS, ["R"], R=count)
    _check.terms(_OP, vocabulary, bias, softcap, logit_scale)
    _check.integer(_OP, "ignore_index", ignore_index)
    if gold is not None:
        _check.gold(_OP, gold, count)
    if not logits.is_contiguous():
        raise ValueError(f"{_OP}: logits must be contiguous, got strides {logits.stride()}")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError(f"{_OP}: logits must not require a gradient, because it overwrites them")
    _check.together(
        _OP, logits=logits, target=target, weight=weight, bias=bias, **_check.gold_tensors(gold)
    )
    if backend() == "reference":
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
    nll, lse, entropy, correct, gold_logit, gold_logp = torch.ops.compact.row_stats_(
        logits,
        target.long(),
        None if weight is None else weight.detach(),
        *((None, None, None) if gold is None else (t.long() for t in gold)),
        None if bias is None else bias.detach(),
        softcap or 0.0,
        logit_scale,
        ignore_index,
    )
    # A graph that saved these logits must raise in its backward instead of reading the gradients.
    torch.autograd.graph.increment_version(logits)
    if gold is None:
        gold_logit = gold_logp = None
    return TokenStats(nll, lse, entropy, correct, gold_logit, gold_logp)


def _fake(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    return empty_statistics(logits, logits.shape[0], gold_ids)


register_fake("compact::row_stats_", _fake)
