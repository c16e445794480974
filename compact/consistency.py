"""The consistency term: rationales that count together should lead the student to like predictions.

sum_{i<j} alpha_i alpha_j symKL(P_i, P_j), symKL(p, q) = KL(p || q) + KL(q || p), each pair's
averaged over its aligned positions. Two kinds:

- "positions", as released: completions are aligned token by token from the last prompt position on.
  The rationales share a prompt, so that is the absolute position.
- "answer": their answer parts are aligned, from the answer marker on; a rationale without one has
  no pair. What two rationales say on the way may differ, what they conclude should not.

Source: COMPACT (arXiv 2601.13992), as restated in the design notes.
"""

from __future__ import annotations

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
    rationales = [r for problem in batch.problems for r in problem.rationales]
    begin = [r.marker if kind == "answer" else 0 for r in rationales]
    problem_offsets = batch.problem_offsets.tolist()
    left, right, factors = [], [], []
    for first, end in zip(problem_offsets[:-1], problem_offsets[1:], strict=True):
        for i in range(first, end):
            for j in range(i + 1, end):
                a, b = offsets[i] + begin[i], offsets[j] + begin[j]
                count = min(offsets[i + 1] - a, offsets[j + 1] - b)
                if count <= 0 or alpha[i] * alpha[j] < SKIP:
                    continue
                left.append(torch.arange(a, a + count))
                right.append(torch.arange(b, b + count))
                factors.append(torch.full((count,), alpha[i] * alpha[j] / count))
    if not left:
        return live_hidden.new_zeros((), dtype=torch.float32)
    device = live_hidden.device
    divergence = pairwise_symmetric_kl(
        live_hidden.flatten(0, 1),
        student.weight,
        batch.rows[torch.cat(left).to(device)],
        batch.rows[torch.cat(right).to(device)],
        bias=student.bias,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
    )
    return (divergence * torch.cat(factors).to(device)).sum()
