"""Difficulty as the rank-surprisal ratio of a rationale.

RSR_k = sum_t min(r_t, 100) / sum_t s_t over the completion tokens, including the end-of-turn token.
s_t = -log p(y_t), in nats; r_t is 1 + the number of tokens with a larger logit. Source: RSR (arXiv
2601.14249), where a lower ratio is better: tokens that surprise the student and yet rank high. The
paper's score of a teacher is the ratio of the means over its rationales, not the mean of ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.segments import segment_sum

# A larger rank counts as this one (the paper's r_max).
_MOST = 100


@register(
    "rsr",
    axis="difficulty",
    statistics=("rank",),
    aggregation="ratio of sums over tokens; ratio of means over rationales",
)
def rsr(pass_: Pass) -> Tensor:
    """Returns [R] capped rank per nat of surprisal, > 0."""
    rank, offsets = pass_.stats.rank, pass_.batch.token_offsets
    assert rank is not None
    surprisal = segment_sum(pass_.stats.nll.detach(), offsets)
    # A rationale that the student knows by heart has a sum of 0.
    least = torch.finfo(surprisal.dtype).eps
    capped = rank.clamp(max=_MOST).to(surprisal.dtype)
    return segment_sum(capped, offsets) / surprisal.clamp(min=least)
