"""Control: the entropy of the few tokens at which the student is least certain.

U_k = the sum of H_t over the ceil(0.005 T_k) completion tokens with the largest entropy H_t of the
student's prediction. Source: High-Entropy Sum (HES, arXiv 2605.22389), in which higher is better.
A rationale of up to 200 tokens has one such token, so U is then the largest entropy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass

SHARE = 0.005


@register(
    "uncertain-tokens",
    axis="control",
    aggregation="sum over the top 0.5% of tokens; mean over rationales",
)
def uncertain_tokens(pass_: Pass) -> Tensor:
    """Returns [R] sum of the largest entropies in nats."""
    parts = pass_.stats.entropy.detach().split(pass_.batch.on_host.token_offsets.diff().tolist())
    return torch.stack([h.topk(math.ceil(SHARE * len(h))).values.sum() for h in parts])
