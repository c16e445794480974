"""Consensus as agreement of what rationales do to the student's belief, not of their wording.

P_k is the student's distribution over the options (softmax of their mean log-likelihoods) after the
steps of rationale k that state no answer (see `leak-adjusted`). The score is

C_k = sum over j != k of w_j (1 - JSD(P_k, P_j) / ln 2)

JSD is the Jensen-Shannon divergence in nats (Lin, IEEE Trans. Inf. Theory 1991), at most ln 2. The
weights w_j are even, or the given trust in rationale j, and sum to 1. C_k is 0 for a lone rationale
and in a problem without options. Source: this project.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compact.metrics import register
from compact.metrics.option_contrast import option_leaves
from compact.passes import Pass


def agreement_of(posteriors: Tensor, trust: Tensor | None = None) -> Tensor:
    """Returns [K] the score C_k of each distribution.

    Args:
        posteriors: [K, J] probabilities, rows sum to 1.
        trust: [K] weights >= 0 of the rationales as judges of others; None for even weights. If the
            others of k have no trust at all, C_k is 0.
    """
    if trust is None:
        trust = posteriors.new_ones(len(posteriors))
    mean = 0.5 * (posteriors[:, None] + posteriors[None])
    entropy = torch.special.entr(posteriors).sum(-1)
    jsd = torch.special.entr(mean).sum(-1) - 0.5 * (entropy[:, None] + entropy[None])
    agree: Tensor = 1.0 - jsd.clamp(0.0, math.log(2)) / math.log(2)
    weight = trust.repeat(len(trust), 1).fill_diagonal_(0.0)
    total = weight.sum(1)
    return (weight * agree).sum(1) / torch.where(total > 0, total, 1.0)


@register("posterior-consensus", axis="consensus", needs_options=True)
def posterior_consensus(pass_: Pass) -> Tensor:
    """Returns [R] C_k in 0..1, with even weights."""
    leaves, logp = option_leaves(pass_, "posterior-consensus")
    of_place = logp.split(leaves.offsets.diff().tolist())
    found = []
    for places in leaves.unstated.split(pass_.batch.counts):
        scores = torch.stack([of_place[place] for place in places.tolist()])
        found.append(
            agreement_of(scores.softmax(1)) if scores.shape[1] else scores.new_zeros(len(scores))
        )
    return torch.cat(found)
