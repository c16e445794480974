"""Adaptability as the mean log-likelihood of a rationale: the answer that the student finds likely.

G_k = (1/T_k) sum_t log p(y_t) over the completion tokens, end-of-turn token included: minus the
metric `nll`. Source: GRAPE (arXiv 2502.04194), which keeps the response that the student to be
trained finds most likely. Higher is better. Weakness: long steps dilute their unlikely first tokens
(see `aslec-drop`), and a likely text need not be right.
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import TOKEN_MEAN, register
from compact.passes import Pass
from compact.passes.segments import segment_mean


@register("grape", axis="adaptability", aggregation=TOKEN_MEAN)
def grape(pass_: Pass) -> Tensor:
    """Returns [R] mean log-likelihood in nats per token, at most 0."""
    return -segment_mean(pass_.stats.nll.detach(), pass_.batch.token_offsets)
