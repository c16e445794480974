"""Difficulty as the mean negative log-likelihood of a rationale.

D_k = (1/T_k) sum_t nll^k_t over the completion tokens, including the end-of-turn token. Source: the
abstract of COMPACT (arXiv 2601.13992), "loss-based difficulty"; the released code does the same.
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import TOKEN_MEAN, register
from compact.passes import Pass
from compact.passes.segments import segment_mean


@register("nll", axis="difficulty", aggregation=TOKEN_MEAN)
def nll(pass_: Pass) -> Tensor:
    """Returns [R] mean nll in nats per token."""
    return segment_mean(pass_.stats.nll.detach(), pass_.batch.token_offsets)
