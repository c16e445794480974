"""The consistency term: rationales that count together should lead the student to like predictions.

sum_{i<j} alpha_i alpha_j symKL(P_i, P_j), symKL(p, q) = KL(p || q) + KL(q || p), each pair's
averaged over its aligned positions. Two kinds:

- "positions", as released: every absolute position where both rows hold a token, that of the
  shorter one's last token included. Over the prompt they share, two rationales predict alike: those
  positions add nothing, so they are not computed, but the mean is over them too. Under dropout that
  holds of a tree, which reads the prompt once; rows that repeat it differ by what each has dropped,
  and there it is computed.
- "answer": what predicts their answer parts is aligned, from the answer marker on; a rationale
  without one has no pair. What two rationales say on the way may differ, what they conclude should
  not.

Source: COMPACT (arXiv 2601.13992), as restated in the design notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn

from compact.passes import Pass
from compact_ops import pairwise_symmetric_kl

SKIP = 1e-4
"""Pairs whose product of weights is below this are left out."""


@dataclass(frozen=True)
class ConsistencyTerm:
    """The term as a loss term of the trainer, times lambda.

    Attributes:
        factor: lambda.
        kind: "positions" or "answer".
    """

    factor: float
    kind: str
    name: ClassVar[str] = "consistency"

    def __call__(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns lambda times `consistency_loss`, a scalar."""
        return self.factor * consistency_loss(hidden, pass_, weight, self.kind)


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
    # Whether rows differ over the prompt they share, so that its positions have to be computed.
    noisy = kind == "positions" and batch.layout == "padded" and _drops(student.body)
    left, right, factors = [], [], []
    first = 0
    for problem in batch.problems:
        prompt = len(problem.prompt_ids)
        places = []
        for r, rationale in enumerate(problem.rationales, first):
            if kind == "answer":
                places.append(batch.rows[offsets[r] + rationale.marker : offsets[r + 1]])
                continue
            own = batch.token_rows[offsets[r] : offsets[r + 1]]
            shared = torch.arange(-prompt if noisy else 0, 0, device=own.device) + own[0]
            places.append(torch.cat([shared, own]))
        alike = prompt if kind == "positions" and not noisy else 0
        for i, j in combinations(range(len(places)), 2):
            both = alpha[first + i] * alpha[first + j]
            count = min(len(places[i]), len(places[j]))
            if count == 0 or both < SKIP:
                continue
            left.append(places[i][:count])
            right.append(places[j][:count])
            factors.append(torch.full((count,), both / (alike + count)))
        first += len(places)
    if not left:
        return live_hidden.new_zeros((), dtype=torch.float32)
    divergence = pairwise_symmetric_kl(
        live_hidden.flatten(0, 1),
        student.weight,
        torch.cat(left),
        torch.cat(right),
        bias=student.bias,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
    )
    return (divergence * torch.cat(factors).to(divergence.device)).sum()


def _drops(body: nn.Module) -> bool:
    """Whether two runs of the body over the same tokens differ."""
    return any(
        m.training and (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0))
        for m in body.modules()
    )
