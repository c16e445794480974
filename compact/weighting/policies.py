"""Policies: simple ways to weigh teachers, the baselines of COMPACT.

A policy takes its settings and returns a function (pass, optimizer steps so far) -> weights [R].
`@register_policy(NAME)` registers it. A policy can skip a problem, for example if the single
teacher has no rationale for it or no rationale is right. It then gives 0 to all rationales of the
problem, and the problem has no loss.

A policy that learns during training is a `StatefulPolicy`, in a file of its own in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from compact.metrics.answer import answer_share
from compact.passes import Pass
from compact.passes.segments import segment_mean, segment_of, segment_sum
from compact.registry import Registry


class StatefulPolicy:
    """A policy that logs, or that changes with the scores of each optimizer step.

    The trainer gathers the scores of a step from all micro-batches and ranks, in data order. State
    that only `update` changes is therefore the same for any micro-batches, accumulation and ranks.
    """

    def scores(self, pass_: Pass) -> dict[str, Tensor]:
        """Returns name -> [R] float: what `weigh` and `update` need. Changes no state."""
        return {}

    def weigh(self, scores: Mapping[str, Tensor], pass_: Pass) -> Tensor:
        """Returns the weights [R] of a pass from its scores. Changes no state but the log's."""
        raise NotImplementedError

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Updates the state with the scores of an optimizer step, problems in data order."""

    def take_log(self) -> dict[str, float]:
        """Returns named numbers for a line of the training log, of the steps since the last one."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


Policy = Callable[[Pass, int], Tensor] | StatefulPolicy
POLICIES: Registry[Callable[..., Policy]] = Registry("policy")
register_policy = POLICIES.register
SINGLE = "single"
"""The policy that is written single:TEACHER."""


def split_teacher(name: str) -> tuple[str, str | None]:
    """Returns the policy in "single:TEACHER" and its teacher; `name` and None for any other."""
    policy, colon, teacher = name.partition(":")
    return (SINGLE, teacher) if policy == SINGLE and teacher else (name, None)


def _share(mass: Tensor, offsets: Tensor) -> Tensor:
    """Returns [R] mass >= 0 divided by its sum over the problem; 0 if the sum is 0."""
    total = segment_sum(mass, offsets)[segment_of(offsets)]
    return torch.where(total > 0, mass / total.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def _sizes(pass_: Pass) -> Tensor:
    """Returns [R] float K, the number of rationales of each rationale's problem."""
    offsets = pass_.batch.problem_offsets
    return offsets.diff()[segment_of(offsets)].float()


@register_policy("uniform")
def uniform() -> Policy:
    """Weights 1 / K."""
    return lambda pass_, _: 1.0 / _sizes(pass_)


@register_policy("random")
def random(seed: int = 0) -> Policy:
    """Weights drawn uniformly from the simplex: normalised Exp(1) draws.

    The draws depend on (seed, step, question, rationale) only, not on the micro-batches, the rank
    or the order of the teachers.
    """

    def policy(pass_: Pass, steps: int) -> Tensor:
        draws = [
            Random(f"{seed}/{steps}/{problem.question_id}/{rationale.ids}").expovariate(1.0)
            for problem in pass_.batch.problems
            for rationale in problem.rationales
        ]
        offsets = pass_.batch.problem_offsets
        return _share(torch.tensor(draws, device=offsets.device).clamp(min=1e-6), offsets)

    return policy


@register_policy(SINGLE)
def single(teacher: str) -> Policy:
    """Weights 1 for the rationale of one teacher: distillation from that teacher only."""

    def policy(pass_: Pass, _: int) -> Tensor:
        offsets = pass_.batch.problem_offsets
        mine = [float(name == teacher) for name in pass_.batch.teachers]
        return _share(torch.tensor(mine, device=offsets.device), offsets)

    return policy


@register_policy("answer-vote")
def answer_vote() -> Policy:
    """Equal weights for the rationales whose final answer has the most votes (ties included)."""

    def policy(pass_: Pass, _: int) -> Tensor:
        offsets = pass_.batch.problem_offsets
        share = answer_share(pass_.batch)
        best = torch.stack([part.max() for part in share.split(offsets.diff().tolist())])
        return _share((share == best[segment_of(offsets)]).float(), offsets)

    return policy


@register_policy("softmax-nll")
def softmax_nll(tau: float = 1.0) -> Policy:
    """Weights softmax_k(-NLL_k / tau), NLL_k the mean nll over the rationale's tokens."""

    def policy(pass_: Pass, _: int) -> Tensor:
        offsets = pass_.batch.problem_offsets
        score = -_mean_nll(pass_) / tau
        return torch.cat([part.softmax(0) for part in score.split(offsets.diff().tolist())])

    return policy


@register_policy("ca-mkd")
def ca_mkd() -> Policy:
    """Weights (1 - softmax_k CE_k) / (K - 1).

    Source: CA-MKD (Zhang et al., arXiv 2201.00007). It uses a teacher's cross-entropy on the label;
    a text teacher has no logits, so this uses the student's cross-entropy CE_k on the rationale.
    K = 1 gives 1.
    """

    def policy(pass_: Pass, _: int) -> Tensor:
        offsets = pass_.batch.problem_offsets
        parts = _mean_nll(pass_).split(offsets.diff().tolist())
        return _complement(torch.cat([part.softmax(0) for part in parts]), pass_)

    return policy


@register_policy("ebkd")
def ebkd() -> Policy:
    """Weights (1 - H_k / sum H) / (K - 1), H_k the student's mean entropy along the rationale.

    Source: entropy-based weighting (Kwon et al., 2020), with the student's entropy in place of the
    teacher's, which has no logits. K = 1 gives 1.
    """

    def policy(pass_: Pass, _: int) -> Tensor:
        entropy = segment_mean(pass_.stats.entropy.detach(), pass_.batch.token_offsets).float()
        return _complement(_share(entropy, pass_.batch.problem_offsets), pass_)

    return policy


@register_policy("oracle")
def oracle(teachers: Collection[str] = ()) -> Policy:
    """Equal weights for the right rationales: those whose final answer is the gold answer.

    If it is known which teachers are right (the teacher zoo), `teachers` names them instead.
    """

    def policy(pass_: Pass, _: int) -> Tensor:
        right = [
            float(r.teacher in teachers if teachers else r.answer == problem.gold)
            for problem in pass_.batch.problems
            for r in problem.rationales
        ]
        offsets = pass_.batch.problem_offsets
        return _share(torch.tensor(right, device=offsets.device), offsets)

    return policy


def _mean_nll(pass_: Pass) -> Tensor:
    return segment_mean(pass_.stats.nll.detach(), pass_.batch.token_offsets).float()


def _complement(share: Tensor, pass_: Pass) -> Tensor:
    """Returns (1 - share) / (K - 1), and 1 where K = 1."""
    sizes = _sizes(pass_)
    return torch.where(sizes > 1, (1.0 - share) / (sizes - 1.0).clamp(min=1.0), 1.0)
