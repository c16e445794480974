"""CRSD: a student that has read the rationale teaches itself to answer without it.

For a rationale r_k with the gold answer, a its tokens from the answer marker on:

    L_KL = sum_k alpha_k mean_i KL( p(. | q, r_k, a_<i) || p(. | q, a_<i) )
    L_NCE = - log exp(sim(h, h+) / t) / sum_j exp(sim(h, h_j) / t),   t = .05

The first distribution is the target and has no gradient. h is the state after the question alone,
h+ that after the rationale, each where the answer marker is predicted; h_j are those of the other
problems of the micro-batch. `label` adds the negative log-likelihood of the answer given the
question alone.

Source: contrastive reasoning self-distillation, search relevance (arXiv 2510.11056). Ours: the
answer is that of a rationale's text, weights are COMPACT's, and the divergence is computed block by
block over the vocabulary. It costs one more forward over question and answer, without rationale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compact.means import Means
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import plain_rationale
from compact.passes.forward import token_states
from compact.passes.lazily import LazyProblems
from compact.passes.packing import build_batch
from compact.passes.segments import segment_mean
from compact.settings import MAX_LENGTH
from compact.strategies.base import (
    LossTerm,
    Strategy,
    Term,
    check_markers,
    register_strategy,
)
from compact.strategies.white_box import completion_states, divergence

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.weighting import Weigher


@register_strategy("crsd")
class Crsd(Strategy):
    """The student with the rationale teaches the student without: KL on the answer and InfoNCE."""

    needs = ("gold",)

    needs_whole_model: ClassVar[bool] = True  # only what is right is read a second time

    def __init__(
        self,
        kl: float = 1.0,
        nce: float = 0.1,
        label: float = 1.0,
        temperature: float = 0.05,
        rationales: float = 1.0,
    ) -> None:
        """Sets up the factors.

        Args:
            kl: factor of L_KL.
            nce: factor of L_NCE; needs micro-batches of two or more problems.
            label: factor of the answer's negative log-likelihood given the question alone.
            temperature: t.
            rationales: factor on the likelihood of the rationales themselves.

        Raises:
            ValueError: a value is not allowed.
        """
        for name, value in (("kl", kl), ("nce", nce), ("label", label), ("rationales", rationales)):
            check_number(f"{name} of crsd", value, least=0)
        check_number("temperature of crsd", temperature, above=0)
        self.kl, self.nce, self.label, self.temperature = kl, nce, label, temperature
        self.nll_factor = rationales
        self.max_length = MAX_LENGTH
        self._means = Means()

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses InfoNCE without other problems in the micro-batch."""
        if self.nce and args.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size must be at least 2 with strategy crsd, whose InfoNCE "
                "contrasts the problems of a micro-batch, or set strategy_options {nce: 0}, got "
                f"{args.per_device_train_batch_size}"
            )
        self.max_length = args.max_length

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Warns of right rationales without an answer to learn; of large data, a sample is read.

        Raises:
            ValueError: there is no other.
        """
        encoded = LazyProblems(problems, processing_class, judged=False, max_length=self.max_length)
        check_markers("crsd", encoded, "the student learns no answer from them", only_right=True)
        return problems

    def term(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns the three terms of a pass."""
        batch, student = pass_.batch, pass_.student
        means = self._means if hidden.requires_grad else Means()  # evaluation is not logged
        alone: list[EncodedProblem] = []
        tokens: list[Tensor] = []  # of the answers, among the completion tokens of the pass
        alphas: list[float] = []
        owners: list[int] = []
        offsets, r, weights = batch.token_offsets.tolist(), 0, weight.tolist()
        for p, problem in enumerate(batch.problems):
            answers = []
            for rationale, right in zip(problem.rationales, problem.right, strict=True):
                answer = rationale.ids[rationale.marker :]
                if right and answer and weights[r] > 0:
                    answers.append(plain_rationale(rationale.teacher, answer, ""))
                    tokens.append(torch.arange(offsets[r] + rationale.marker, offsets[r + 1]))
                    alphas.append(weights[r])
                    owners.append(p)
                r += 1
            if answers:
                alone.append(replace(problem, rationales=tuple(answers)))
        if not alone:
            return hidden.new_zeros((), dtype=torch.float32)
        short = build_batch(
            alone, layout=batch.layout, leaves=False, pad_token_id=student.pad_token_id
        ).to(hidden.device)
        states = token_states(student, short)  # [n, H], with gradient
        read = completion_states(hidden, pass_)[torch.cat(tokens).to(hidden.device)]
        alpha = weight.new_tensor(alphas)
        total = hidden.new_zeros((), dtype=torch.float32)
        if self.kl:
            found = divergence(states, student, read.detach(), student)
            part = (alpha * segment_mean(found, short.token_offsets)).sum()
            means.add("kl", float(part.detach()), len(alone))
            total = total + self.kl * part
        if self.label:
            nll = student.token_stats(states, short.target).nll
            part = (alpha * segment_mean(nll, short.token_offsets)).sum()
            means.add("answer nll", float(part.detach()), len(alone))
            total = total + self.label * part
        if self.nce and len(alone) > 1:
            first = short.token_offsets[:-1]
            part = _info_nce(states[first], read[first], alpha, owners, self.temperature)
            means.add("nce", float(part.detach()), len(alone))
            total = total + self.nce * part
        return total

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the term."""
        return [Term("crsd", self.term)]

    def take_log(self) -> dict[str, float]:
        """Returns the mean of each part over the problems with a right rationale."""
        return self._means.take()


def _info_nce(
    own: Tensor, read: Tensor, alpha: Tensor, owners: Sequence[int], temperature: float
) -> Tensor:
    """Returns sum_k alpha_k of InfoNCE; the negatives are rationales of other problems."""
    f, g = (nn.functional.normalize(x.float(), dim=1) for x in (own, read))
    z = f @ g.T / temperature
    owner = torch.tensor(owners, device=z.device)
    same = (owner[:, None] == owner) & ~torch.eye(len(owner), dtype=torch.bool, device=z.device)
    z = z.masked_fill(same, -torch.inf)
    return -(alpha * (z.diagonal() - z.logsumexp(1))).sum()
