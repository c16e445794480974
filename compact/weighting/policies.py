"""Policies: simple ways to weigh teachers, the baselines of COMPACT.

A policy takes its settings and returns a function (pass, optimizer steps so far) -> weights [R].
`@register_policy(NAME)` registers it. A policy can skip a problem, for example if the single
teacher has no rationale for it or no rationale is right. It then gives 0 to all rationales of the
problem, and the problem has no loss. A policy that reads more of the pass than its token statistics
says so in an attribute of what it returns: `policy.needs = Needs(statistics=("rank",))`. One that
reads the data alone says `Needs(student=False)`: its weights are known before the student runs, so
a trained head is done in one sweep. If it gives weight 0, it should say to which rationales in an
attribute `skips` (`Skips`): they are not read.

A policy that learns during training is a `StatefulPolicy`, in a file of its own in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from compact.metrics import get_metric
from compact.metrics.answer import votes
from compact.options import check_number
from compact.passes import Batch, EncodedProblem, Needs, Pass
from compact.passes.segments import (
    segment_max,
    segment_mean,
    segment_of,
    segment_softmax,
    segment_sum,
)
from compact.passes.transfer import put
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
Skips = Callable[[EncodedProblem], Sequence[bool]]
"""[K] whether a rationale of a problem gets weight 0 whatever the student says. Can be pickled."""
POLICIES: Registry[Callable[..., Policy]] = Registry("policy")
register_policy = POLICIES.register
SINGLE = "single"
"""The policy that is written single:TEACHER."""
_ROUNDING = 1e-5
"""Scores that differ by this share of the best one are equal."""


def split_teacher(name: str) -> tuple[str, str | None]:
    """Returns the policy in "single:TEACHER" and its teacher; `name` and None for any other."""
    policy, colon, teacher = name.partition(":")
    return (SINGLE, teacher) if policy == SINGLE and teacher else (name, None)


def _share(mass: Tensor, offsets: Tensor) -> Tensor:
    """Returns [R] mass >= 0 divided by its sum over the problem; 0 if the sum is 0."""
    total = segment_sum(mass, offsets)[segment_of(offsets, mass.numel())]
    return torch.where(total > 0, mass / total.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def _sizes(batch: Batch) -> Tensor:
    """Returns [R] float K, the number of rationales of each rationale's problem."""
    return batch.problem_offsets.diff()[batch.problem].float()


@dataclass(frozen=True)
class _ByData:
    """A policy that reads the data alone, so that its weights are known before the student runs.

    Attributes:
        weigh: from a batch and the optimizer steps before it to weights [R].
    """

    weigh: Callable[[Batch, int], Tensor]
    needs: ClassVar[Needs] = Needs(student=False)

    def __call__(self, pass_: Pass, steps: int) -> Tensor:
        return self.weigh(pass_.batch, steps)


Choice = Callable[[EncodedProblem], Sequence[bool]]


@dataclass(frozen=True)
class _Even:
    """Even weights over the rationales that the data choose; the others are not read.

    Attributes:
        chosen: [K] whether a rationale of a problem has weight. Can be pickled.
        needs: what it reads.
    """

    chosen: Choice
    needs: Needs = Needs(student=False)

    def __call__(self, pass_: Pass, steps: int) -> Tensor:
        batch = pass_.batch
        mass = [float(chosen) for problem in batch.problems for chosen in self.chosen(problem)]
        return _share(put(mass, batch.problem_offsets), batch.problem_offsets)

    @property
    def skips(self) -> Skips:
        """Which rationales are not chosen."""
        return partial(_not, self.chosen)


def _not(chosen: Choice, problem: EncodedProblem) -> list[bool]:
    return [not one for one in chosen(problem)]


def _of_teachers(problem: EncodedProblem, teachers: Collection[str]) -> list[bool]:
    return [r.teacher in teachers for r in problem.rationales]


def _of_length(problem: EncodedProblem, which: Callable[[list[int]], int]) -> list[bool]:
    lengths = [len(r.ids) for r in problem.rationales]
    wanted = which(lengths)
    return [length == wanted for length in lengths]


def _of_most_votes(problem: EncodedProblem) -> list[bool]:
    counts = votes(problem)
    most = max(counts)
    return [count == most for count in counts]


def _right(problem: EncodedProblem) -> Sequence[bool]:
    return problem.right


@register_policy("uniform")
def uniform() -> Policy:
    """Weights 1 / K."""
    return _ByData(lambda batch, _: 1.0 / _sizes(batch))


@register_policy("random")
def random(seed: int = 0) -> Policy:
    """Weights drawn uniformly from the simplex: normalised Exp(1) draws.

    The draws depend on (seed, step, question, rationale) only, not on the micro-batches, the rank
    or the order of the teachers.
    """

    def policy(batch: Batch, steps: int) -> Tensor:
        draws = [
            Random(f"{seed}/{steps}/{problem.question_id}/{rationale.ids}").expovariate(1.0)
            for problem in batch.problems
            for rationale in problem.rationales
        ]
        offsets = batch.problem_offsets
        return _share(put(draws, offsets).clamp(min=1e-6), offsets)

    return _ByData(policy)


@register_policy(SINGLE)
def single(teacher: str) -> Policy:
    """Weights 1 for the rationale of one teacher: distillation from that teacher only."""
    return _Even(partial(_of_teachers, teachers=(teacher,)))


@register_policy("answer-vote")
def answer_vote() -> Policy:
    """Equal weights for the rationales whose final answer has the most votes (ties included)."""
    return _Even(_of_most_votes)


@register_policy("softmax-nll")
def softmax_nll(tau: float = 1.0) -> Policy:
    """Weights softmax_k(-NLL_k / tau), NLL_k the mean nll over the rationale's tokens.

    Raises:
        ValueError: `tau` is not above 0.
    """
    check_number("tau", tau, above=0)

    def policy(pass_: Pass, _: int) -> Tensor:
        return segment_softmax(-_mean_nll(pass_) / tau, pass_.batch.counts)

    return policy


@register_policy("ca-mkd")
def ca_mkd() -> Policy:
    """Weights (1 - softmax_k CE_k) / (K - 1).

    Source: CA-MKD (Zhang et al., arXiv 2201.00007). It uses a teacher's cross-entropy on the label;
    a text teacher has no logits, so this uses the student's cross-entropy CE_k on the rationale.
    K = 1 gives 1.
    """

    def policy(pass_: Pass, _: int) -> Tensor:
        return _complement(segment_softmax(_mean_nll(pass_), pass_.batch.counts), pass_)

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


@register_policy("rejection")
def rejection() -> Policy:
    """Equal weights for the rationales whose stated answer is the gold answer.

    They are compared in the problem's answer domain. A problem where none is right is skipped. Most
    projects that train on rationales do this, under the name of rejection sampling.
    """
    return _Even(_right, Needs(student=False, gold=True))


@register_policy("oracle")
def oracle(teachers: Collection[str] = ()) -> Policy:
    """Equal weights for the rationales of the teachers that are right, as known from outside.

    For generated teachers, such as those of the zoo. On real data nobody knows this: the policy
    that compares stated answers with the gold one is `rejection`.

    Args:
        teachers: names of the teachers that are right.

    Raises:
        ValueError: no teachers are named.
    """
    if not teachers or isinstance(teachers, str):
        raise ValueError(
            "teachers must list the teachers that are known to be right, "
            f"got {teachers or 'none'!r}; to keep rationales that state the gold answer, use "
            "rejection"
        )
    return _Even(partial(_of_teachers, teachers=tuple(teachers)))


@register_policy("persyn")
def persyn() -> Policy:
    """All weight on the largest 0.6 right + 0.4 likely; ties share it.

    right is 1 if the stated answer is the gold one, else 0. likely is the mean log-likelihood of
    the rationale, scaled to 0..1 between the least and the most likely one of the problem. So a
    right rationale comes before any wrong one, and a problem without a right one keeps the most
    likely. Source: PerSyn (arXiv 2510.10925), which sends each prompt to its best teacher by
    quality and learnability with these shares. Ours: right in place of a reward model, and the
    scaling.
    """

    def policy(pass_: Pass, _: int) -> Tensor:
        offsets = pass_.batch.problem_offsets
        parts = (-_mean_nll(pass_)).split(pass_.batch.counts)
        spans = [(part.max() - part.min()).clamp(min=1e-6) for part in parts]
        likely = torch.cat([(x - x.min()) / d for x, d in zip(parts, spans, strict=True)])
        return _best(0.6 * _states_gold(pass_.batch) + 0.4 * likely, offsets)

    return policy


@dataclass(frozen=True)
class _ByMetric:
    """A policy that turns the scores of one metric into weights.

    Attributes:
        metric: the metric's name.
        weigh: from scores [R] and the problems' offsets [P + 1] to weights [R].
    """

    metric: str
    weigh: Callable[[Tensor, Tensor], Tensor]

    @property
    def needs(self) -> Needs:
        """What the metric reads."""
        return get_metric(self.metric).needs

    def __call__(self, pass_: Pass, steps: int) -> Tensor:
        score = get_metric(self.metric).score(pass_).float()
        return self.weigh(score, pass_.batch.problem_offsets)


def _by_length(batch: Batch, _: int) -> Tensor:
    return _share(batch.token_offsets.diff().float(), batch.problem_offsets)


@register_policy("sft")
def sft() -> Policy:
    """Weights T_k / sum T, T_k the completion tokens: plain SFT on all rationales of a problem.

    Every token of a problem then counts the same. In TRL's SFTTrainer every token of a batch does,
    so problems with more tokens count more; with one problem a step the losses are equal.
    """
    return _ByData(_by_length)


@register_policy("longest")
def longest() -> Policy:
    """All weight on the rationale with the most tokens; ties share it."""
    return _Even(partial(_of_length, which=max))


@register_policy("shortest")
def shortest() -> Policy:
    """All weight on the rationale with the fewest tokens; ties share it."""
    return _Even(partial(_of_length, which=min))


@register_policy("rsr-min")
def rsr_min() -> Policy:
    """All weight on the rationale with the lowest `rsr`, the best one; ties share it.

    Source: RSR (arXiv 2601.14249), which selects one trajectory per problem so.
    """
    return _ByMetric("rsr", lambda score, offsets: _best(-score, offsets))


@register_policy("lark-chi2")
def lark_chi2(keep: int | None = None) -> Policy:
    """Weights (e_k - e_(B+1)) / (B (mean e - e_(B+1))) for the B largest `lark` scores e, else 0.

    e_(B+1) is the largest score that is left out, the mean is over the B kept: the weights are
    sparse, sum to 1 and need no temperature. Source: the chi-square selection of LARK (arXiv
    2605.30651). Ours: B = K - 1 by default and at most; with B = K there is no e_(B+1). Where all
    kept scores equal e_(B+1), the weights are even over all rationales with that score. K = 1 gives
    1.

    Args:
        keep: B, at least 1; None for K - 1.

    Raises:
        ValueError: `keep` is less than 1 or no whole number.
    """
    if keep is not None:
        check_number("keep", keep, least=1, whole=True)

    def weigh(score: Tensor, offsets: Tensor) -> Tensor:
        return torch.cat([_above_next(e, keep) for e in score.split(offsets.diff().tolist())])

    return _ByMetric("lark", weigh)


def _above_next(score: Tensor, keep: int | None) -> Tensor:
    """Returns [K] shares of score - e_(B+1) among the B largest scores of a problem."""
    count = len(score)
    if count == 1:
        return torch.ones_like(score)
    kept = min(keep or count, count - 1)
    left_out = score.sort(descending=True).values[kept]
    rounding = _ROUNDING * score.abs().max()
    mass = torch.where(score > left_out + rounding, score - left_out, 0.0)
    if not bool(mass.any()):
        mass = (score >= left_out - rounding).to(score)
    return mass / mass.sum()


def _best(score: Tensor, offsets: Tensor) -> Tensor:
    """Returns [R] weights: even over the best scores of each problem, ties up to rounding."""
    best = segment_max(score, offsets)[segment_of(offsets, score.numel())]
    return _share((score >= best - _ROUNDING * best.abs()).float(), offsets)


def _states_gold(batch: Batch) -> Tensor:
    """Returns [R] float: 1 where the stated answer is the gold answer, else 0."""
    right = [float(right) for problem in batch.problems for right in problem.right]
    return put(right, batch.problem_offsets)


def _mean_nll(pass_: Pass) -> Tensor:
    return segment_mean(pass_.stats.nll.detach(), pass_.batch.token_offsets).float()


def _complement(share: Tensor, pass_: Pass) -> Tensor:
    """Returns (1 - share) / (K - 1), and 1 where K = 1."""
    sizes = _sizes(pass_.batch)
    return torch.where(sizes > 1, (1.0 - share) / (sizes - 1.0).clamp(min=1.0), 1.0)
