"""Adaptability as statistical dependence between hidden states and the gold answer's likelihood.

HSIC with a linear kernel between the hidden states x_t [d] along the reasoning and c_t, the mean
log-likelihood of the gold answer: HSIC = tr(K H L H) / n^2 with K = X X^T, L = c c^T, H the
centring matrix and n the number of positions. With a linear kernel this equals
|(1/n) sum_t (x_t - mean x)(c_t - mean c)|^2, which takes O(n d) time and O(d) memory and needs no
n x n matrix. Hidden states are first scaled to unit length. Source: HSIC
(Gretton et al., 2005) as an estimator of the mutual information that COMPACT (arXiv 2601.13992)
names; an option, not a default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.segments import segment_mean


def linear_hsic(states: Tensor, level: Tensor, offsets: Tensor) -> Tensor:
    """Returns [R] HSIC of states [M, d] and level [M] within each segment of offsets [R + 1]."""
    product = segment_mean(states * level[:, None], offsets)
    covariance = product - segment_mean(states, offsets) * segment_mean(level, offsets)[:, None]
    return covariance.square().sum(dim=1)


@register("hsic-linear", axis="adaptability", needs_gold=True)
def hsic_linear(pass_: Pass) -> Tensor:
    """Returns [R] HSIC over each rationale's tokens, in nats squared.

    The rows are those that predict the completion's tokens.
    """
    level = pass_.stats.gold_logp
    if level is None:
        raise ValueError("hsic-linear: stats must hold the gold answer's logits, got none")
    states = pass_.hidden.flatten(0, 1)[pass_.batch.rows].double()
    states = torch.nn.functional.normalize(states, dim=1)
    return linear_hsic(states, level.double(), pass_.batch.token_offsets)
