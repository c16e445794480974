"""Consensus as attention between the last tokens of the rationales.

v_k is the final hidden state at the rationale's last token; A = row softmax of (W_Q v)(W_K v)^T /
sqrt(d_q) with the projections of the student's last layer, d_q the number of query features, the
diagonal set to 0 after the softmax; C_k = sum_i A_ik. With grouped-query attention the flattened
key features are repeated feature by feature, and no rotary embedding is added. Source: the
released training code of COMPACT (arXiv 2601.13992), as restated in the design notes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass


@register("attention", axis="consensus")
def attention(pass_: Pass) -> Tensor:
    """Returns [R] attention received from the other rationales of the problem; 0 for K = 1."""
    batch = pass_.batch
    projections: Any = pass_.student.last_attention()
    last = batch.token_rows[batch.token_offsets[1:] - 1]
    state = pass_.hidden.flatten(0, 1)[last]
    with pass_.student.gathered(projections):
        query, key = projections.q_proj(state), projections.k_proj(state)
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"attention: query features must be a multiple of key features, "
            f"got {query.shape[1]} and {key.shape[1]}"
        )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    sizes = batch.counts
    scores = []
    for q, k in zip(query.split(sizes), key.split(sizes), strict=True):
        graph = torch.softmax((q @ k.T).float() / q.shape[1] ** 0.5, dim=1)
        scores.append(graph.fill_diagonal_(0.0).sum(dim=0))
    return torch.cat(scores)
