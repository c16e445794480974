"""The consistency term: rationales that count together should lead the student to like predictions.

sum_{i<j} alpha_i alpha_j symKL(P_i, P_j), symKL(p, q) = KL(p || q) + KL(q || p), each pair's
averaged over its aligned positions. Two kinds:

- "positions", as released: every absolute position where both rows hold a token, that of the
  shorter one's last token included. Over the prompt they share, two rationales predict alike: those
  positions add nothing, so they are not computed, but the mean is over them too.
- "answer": what predicts their answer parts is aligned, from the answer marker on; a rationale
  without one has no pair. What two rationales say on the way may differ, what they conclude should
  not.

Source: COMPACT (arXiv 2601.13992), as restated in the design notes.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from compact.passes import Pass
from compact_ops import pairwise_symmetric_kl

SKIP = 1e-4
"""Pairs whose product of weights is below this are left out."""


def consistency_loss(live_hidden: Tensor, pass_: Pass, weights: Tensor, kind: str) -> Tensor:
    """Returns the term summed over the problems of the pass, a scalar; lambda is the caller's.

    Args:
        live_hidden: [B, L, H] final hidden states with their graph.
        pass_: the pass they belong to.
        weights: [R] weights of the rationales.
        kind: "positions" or "answer".

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in ("positions", "answer"):
        raise ValueError(f"consistency kind must be positions or answer, got {kind!r}")
    batch, student = pass_.batch, pass_.student
    offsets = batch.token_offsets.tolist()
    alpha = weights.detach().tolist()
    rows = batch.rows if kind == "answer" else batch.token_rows
    left, right, factors = [], [], []
    first = 0
    for problem in batch.problems:
        members = range(first, first + len(problem.rationales))
        first = members.stop
        for (i, one), (j, other) in combinations(zip(members, problem.rationales, strict=True), 2):
            a, b, alike = offsets[i], offsets[j], len(problem.prompt_ids)
            if kind == "answer":
                a, b, alike = a + one.marker, b + other.marker, 0
            count = min(offsets[i + 1] - a, offsets[j + 1] - b)
            if count <= 0 or alpha[i] * alpha[j] < SKIP:
                continue
            left.append(torch.arange(a, a + count))
            right.append(torch.arange(b, b + count))
            factors.append(torch.full((count,), alpha[i] * alpha[j] / (alike + count)))
    if not left:
        return live_hidden.new_zeros((), dtype=torch.float32)
    device = live_hidden.device
    divergence = pairwise_symmetric_kl(
        live_hidden.flatten(0, 1),
        student.weight,
        rows[torch.cat(left).to(device)],
        rows[torch.cat(right).to(device)],
        bias=student.bias,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
    )
    return (divergence * torch.cat(factors).to(device)).sum()
