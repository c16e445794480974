"""The consistency term: rationales with high weights should lead to similar predictions.

sum_{i<j} alpha_i alpha_j symKL(P_i, P_j), symKL(p, q) = KL(p || q) + KL(q || p). The divergence of
each pair is the mean over its aligned positions. There are two kinds of alignment:

- "positions", as released: every absolute position where both rows have a token, including the last
  token of the shorter row. Two rationales predict the same over the prompt that they share, so the
  prompt positions are not computed: they count as zeros in the mean. With dropout this is true for
  the tree layout, which reads the prompt once. Padded rows repeat the prompt with different
  dropout, so there the prompt positions are computed.
- "answer": the positions that predict the answer parts, from the answer marker on. A rationale
  without a marker has no pairs. The reasoning of two rationales may differ; their conclusions
  should not.

Source: COMPACT (arXiv 2601.13992), as restated in the design notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn

from compact.passes import Pass
from compact.passes.transfer import Arriving, send
from compact_ops import pairwise_symmetric_kl

SKIP = 1e-4
"""Pairs whose product of weights is smaller than this are skipped."""


@dataclass(frozen=True)
class ConsistencyTerm:
    """The consistency term, times lambda, as a loss term of the trainer.

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
    """Returns the term summed over the problems of the pass, a scalar, without the factor lambda.

    Args:
        live_hidden: [B, L, H] final hidden states with their autograd graph.
        pass_: the pass that they belong to.
        weights: [R] weights of the rationales.
        kind: "positions" or "answer".

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in ("positions", "answer"):
        raise ValueError(f"consistency kind must be positions or answer, got {kind!r}")
    batch, student = pass_.batch.on_host, pass_.student
    arriving = Arriving({"alpha": weights.detach()})
    offsets = batch.token_offsets.tolist()
    # Whether rows differ over their shared prompt, so that its positions must be computed.
    noisy = kind == "positions" and batch.layout == "padded" and _drops(student.body)
    places = []
    for problem, first in zip(batch.problems, batch.problem_offsets.tolist(), strict=False):
        for r, rationale in enumerate(problem.rationales, first):
            if kind == "answer":
                places.append(batch.rows[offsets[r] + rationale.marker : offsets[r + 1]])
                continue
            own = batch.token_rows[offsets[r] : offsets[r + 1]]
            shared = torch.arange(-len(problem.prompt_ids) if noisy else 0, 0) + own[0]
            places.append(torch.cat([shared, own]))
    alpha = arriving.get()["alpha"].tolist()
    left, right, factors = [], [], []
    for problem, first in zip(batch.problems, batch.problem_offsets.tolist(), strict=False):
        alike = len(problem.prompt_ids) if kind == "positions" and not noisy else 0
        for i, j in combinations(range(first, first + len(problem.rationales)), 2):
            both = alpha[i] * alpha[j]
            count = min(len(places[i]), len(places[j]))
            if count == 0 or both < SKIP:
                continue
            left.append(places[i][:count])
            right.append(places[j][:count])
            factors.append(torch.full((count,), both / (alike + count)))
    if not left:
        return live_hidden.new_zeros((), dtype=torch.float32)
    (factor,) = send([torch.cat(factors)], live_hidden.device)
    divergence = pairwise_symmetric_kl(
        *student.head_inputs(live_hidden.flatten(0, 1)),
        torch.cat(left),
        torch.cat(right),
        bias=student.bias,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
    )
    return (divergence * factor).sum()


def _drops(body: nn.Module) -> bool:
    """Whether two runs of the body over the same tokens differ."""
    return any(
        m.training and (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0))
        for m in body.modules()
    )
