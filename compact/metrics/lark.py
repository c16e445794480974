"""Adaptability as learnability: how much faster than its peers the student would learn a rationale.

e_k = (2 B_k - R L_k) / sum_j L_j over the problem's rationales j. L_k is the mean nll of a token,
B_k the mean of |onehot(y_t) - p_t|^2 = 1 - 2 p(y_t) + sum_v p_v^2, the squared norm of the gradient
of the nll with respect to the logits, and R = sum_j B_j / sum_j L_j. Higher is better. Source: LARK
(arXiv 2605.30651); its public code takes sum_v p_v^2 over the 50 largest probabilities, this takes
it over all of them.

The scores of a problem sum to R. They are shares, so compare them within a problem only. The policy
`lark-chi2` turns them into weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.segments import segment_mean, segment_sum


@register(
    "lark",
    axis="adaptability",
    statistics=("sum_p2",),
    aggregation="means over tokens, shared out within the problem; mean over rationales",
)
def lark(pass_: Pass) -> Tensor:
    """Returns [R] share of learnability."""
    stats, batch = pass_.stats, pass_.batch
    assert stats.sum_p2 is not None  # checked by the registry
    nll = stats.nll.detach()
    square = 1.0 - 2.0 * torch.exp(-nll) + stats.sum_p2
    loss = segment_mean(nll, batch.token_offsets)
    brier = segment_mean(square, batch.token_offsets)
    total = segment_sum(loss, batch.problem_offsets)
    rate = segment_sum(brier, batch.problem_offsets) / total
    return (2.0 * brier - rate[batch.problem] * loss) / total[batch.problem]
