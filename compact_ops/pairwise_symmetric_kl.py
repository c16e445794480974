"""Symmetric Kullback-Leibler divergence of pairs of rows, streamed over the vocabulary."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference

_OP = "pairwise_symmetric_kl"


def pairwise_symmetric_kl(
    hidden: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """KL(p || q) + KL(q || p) of the softmaxes of rows left[i] and right[i]."""
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    _check.tensor(_OP, "left", left, _check.INTS, ["P"])
    _check.tensor(_OP, "right", right, _check.INTS, ["P"], P=left.shape[0])
    return reference.pairwise_symmetric_kl(
        hidden, weight, left, right, bias=bias, softcap=softcap, logit_scale=logit_scale
    )
