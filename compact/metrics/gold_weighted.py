"""Consensus as agreement with the rationales that make the gold answer likely for the student.

w = softmax_k(I^k_n), where I^k_n is the mean log-likelihood of the gold answer after rationale k.
C_k = sum_j w_j cos(g_k, g_j), where g_k is the hidden state at the answer cue after the last step.
Two teachers with the same error cannot outvote one that is right. Source: this project. The plain
consensus in the abstract of COMPACT (arXiv 2601.13992) follows a wrong majority.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.metrics.gain import final_level
from compact.passes import Pass
from compact.passes.segments import segment_softmax


def gold_weights(pass_: Pass) -> Tensor:
    """Returns [R] w = softmax of I_n over the rationales of each problem."""
    return segment_softmax(final_level(pass_), pass_.batch.counts)


def cue_states(pass_: Pass) -> Tensor:
    """Returns [R, H] the hidden state that predicts the answer after each rationale's last step.

    Without a gold answer there is no such state: it is 0.

    Raises:
        ValueError: if the batch was built without answer leaves.
    """
    batch = pass_.batch
    if pass_.leaf_hidden is None:
        raise ValueError(
            "gold-weighted: batch must be built with leaves=True, got no answer leaves"
        )
    leaf = torch.where(
        batch.leaf_offsets.diff() > 0,
        batch.leaf_offsets[1:] - 1,
        batch.question_leaf[batch.problem],
    )
    known = leaf >= 0
    # The last cue token predicts the first gold token of a leaf.
    first = torch.searchsorted(batch.leaf_index, leaf[known])
    states = pass_.leaf_hidden.new_zeros(len(leaf), pass_.leaf_hidden.shape[-1])
    states[known] = pass_.leaf_hidden.flatten(0, 1)[batch.leaf_rows[first]]
    return states


@register("gold-weighted", axis="consensus", needs_leaf_hidden=True, needs_gold=True)
def gold_weighted(pass_: Pass) -> Tensor:
    """Returns [R] weighted mean cosine in -1..1."""
    sizes = pass_.batch.counts
    states = torch.nn.functional.normalize(cue_states(pass_).float(), dim=1).split(sizes)
    weights = gold_weights(pass_).split(sizes)
    return torch.cat([g @ (w @ g) for g, w in zip(states, weights, strict=True)])
