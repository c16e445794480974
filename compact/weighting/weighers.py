"""Turns scores into one weight per rationale, with the presets of COMPACT or with policies.

The z-score over the rationales of a problem is z(S) = (S - mean) / sqrt(var + s0^2), where s0 =
shrink x the running within-problem standard deviation. A rationale that is `judged` to be wrong,
with v = 0 beside others of more, has z = 0 and no say in mean, variance and the running spread: it
need not be read (`Weigher.skips`).

u = sum_s beta_s z_s, with a negative beta for difficulty. alpha = v softmax(u / tau) / sum, v the
validity of the rationale (1 without a metric of that axis), mixed with the uniform weight by floor
and warm-up before v is applied. Weights have no gradient, are >= 0 and sum to 1 over each problem;
K = 1 gives 1. If every validity of a problem is 0, v counts as 1, and `Weights.usable` is False:
who trains or filters leaves the problem out (`Weights.used`). With `judged`, this is so if they sum
to less than `compact.validity.LEAST`.

Noise has z-scores as large as signal, so u alone does not show whether a difference is real. A
preset limits what u can do by its temperature: with tau = 2.5 and the factors of `robust`, scores
that are pure noise leave at least 80% of the teachers in effect (1 / sum of squared weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from random import Random
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compact.metrics import COMPATIBILITY, VALIDITY, Metric, get_metric
from compact.metrics.judged import judgements
from compact.passes import Batch, EncodedProblem, Needs, Pass
from compact.passes.segments import segment_of, segment_sum
from compact.passes.transfer import put
from compact.registry import unknown
from compact.settings import DEFAULT_PRESET
from compact.validity import LEAST
from compact.weighting.consistency import ConsistencyTerm
from compact.weighting.policies import (
    POLICIES,
    SINGLE,
    Policy,
    Skips,
    StatefulPolicy,
    split_teacher,
)
from compact.weighting.presets import PRESETS, Preset
from compact_ops import problem_weights


class Weights(NamedTuple):
    """The weights that a weigher gives to a pass, with the scores behind them.

    Attributes:
        weight: [R] float32, sums to 1 over each problem (all 0 if a policy skips it).
        scores: axis -> [R] the raw score; empty for policies.
        zscores: axis -> [R] the score standardised within its problem; empty for policies.
        usable: [R] bool, False in a problem that is left out, because nothing in it is likely to be
            right; None if every problem is usable.
    """

    weight: Tensor
    scores: dict[str, Tensor]
    zscores: dict[str, Tensor]
    usable: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """[R] the weights that count: 0 in a problem that is not usable."""
        return self.weight if self.usable is None else self.weight * self.usable


class Weigher(Protocol):
    """The interface of presets and policies for the trainer and other callers.

    Attributes:
        name: preset or policy, as the user wrote it.
        needs: what it reads.
        gold_readers: what cannot work without gold answers: metrics, or the policy itself.
        keep_tail: as in `encode_problem`, for every problem that it weighs.
        consistency: the consistency term to add to the loss, or None.
        teacher: the only teacher whose rationales it uses; None if it uses all.
        skips: which rationales of a problem have weight 0 whatever the student says, so that they
            need not be read; None if it gives no such weights.
    """

    name: str
    needs: Needs
    gold_readers: tuple[str, ...]
    keep_tail: bool
    consistency: ConsistencyTerm | None
    teacher: str | None
    skips: Skips | None

    def __call__(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass, checked; changes no state."""

    def weights(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass without reading a number, so that a GPU need not wait."""

    def check(self, weights: Weights, batch: Batch) -> None:
        """Checks what `weights` returned for a batch.

        Raises:
            ValueError: a score or weight is not finite, or a validity is negative. The message
                names question and teacher.
        """

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Updates the running statistics with the scores of one optimizer step.

        The scores are those of all problems on all ranks, in data order.
        """

    def take_log(self) -> dict[str, float]:
        """Returns named numbers for a line of the training log, since the last line."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the running statistics as plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def skip_wrong(problem: EncodedProblem) -> list[bool]:
    """Returns [K] whether a rationale is known to be wrong; all False if they were not judged.

    In a problem that is left out (`compact.validity.LEAST`), all count as wrong.
    """
    found = [r.judgement.validity for r in problem.rationales if r.judgement is not None]
    if len(found) < len(problem.rationales):
        return [False] * len(problem.rationales)
    return _known_wrong(found)


def _known_wrong(validity: Sequence[float]) -> list[bool]:
    """Returns [K] whether each rationale of a problem is known to be wrong."""
    left_out = sum(validity) < LEAST
    return [left_out or v == 0.0 for v in validity]


def skip_beyond(most: int, seed: int, skips: Skips | None, problem: EncodedProblem) -> list[bool]:
    """Returns [K] whether a rationale is skipped, where training reads at most `most` of a problem.

    If the rationales are judged, it reads the most valid ones. It draws among those that are
    equally valid, or not judged. The draw depends on seed, question and teacher only, so a resumed
    run, or one with other ranks, reads the same.

    Args:
        most: at least 1.
        seed: of the draw.
        skips: which rationales are skipped in any case; None: none.
        problem: the problem.
    """
    skipped = [False] * len(problem.rationales) if skips is None else list(skips(problem))

    def order(k: int) -> tuple[float, float]:
        rationale = problem.rationales[k]
        validity = 1.0 if rationale.judgement is None else rationale.judgement.validity
        return -validity, Random(f"{seed}/{problem.question_id}/{rationale.teacher}").random()

    for k in sorted((k for k, skip in enumerate(skipped) if not skip), key=order)[most:]:
        skipped[k] = True
    return skipped


# Share of one optimizer step in the running statistics.
_MOMENTUM = 0.05
_TINY = torch.finfo(torch.float32).tiny


def _variance(values: Sequence[float]) -> float:
    middle = fmean(values)
    return fmean((value - middle) ** 2 for value in values)


class _Checked:
    """A weigher whose call checks the weights."""

    def weights(self, pass_: Pass) -> Weights:
        """As in `Weigher`."""
        raise NotImplementedError

    def check(self, weights: Weights, batch: Batch) -> None:
        """As in `Weigher`."""
        raise NotImplementedError

    def __call__(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass, with the current running statistics.

        Raises:
            ValueError: as in `Weigher.check`.
        """
        weights = self.weights(pass_)
        self.check(weights, pass_.batch)
        return weights


@dataclass
class PresetWeigher(_Checked):
    """Weighs by the axes of a preset; its state is the running spread of their scores.

    Attributes:
        spread: axis -> running within-problem standard deviation of its score.
        updates: optimizer steps seen.
        problems_seen: problems seen with two or more rationales that are not known to be wrong.
    """

    name: str
    preset: Preset
    spread: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    problems_seen: int = 0
    teacher: str | None = None

    def __post_init__(self) -> None:
        self.metrics: dict[str, Metric] = {
            axis: get_metric(getattr(self.preset, axis), axis)
            for axis in COMPATIBILITY
            if getattr(self.preset, axis) != "none"
        }
        name = self.preset.validity
        self.validity = None if name == "none" else get_metric(name, VALIDITY)
        signed = zip(COMPATIBILITY, (1.0, 1.0, -1.0), self.preset.beta, strict=True)
        self._beta = {str(axis): sign * beta for axis, sign, beta in signed if axis in self.metrics}
        self._judged = name == "judged"
        self.skips: Skips | None = skip_wrong if self._judged else None
        # With a validity the weights mean something without gold answers too.
        self.gold_readers = tuple(
            m.name
            for axis, m in self.metrics.items()
            if m.needs.gold and self._beta[axis] and self.validity is None
        )
        read = Needs.of_all(m.needs for m in self.all_metrics.values())
        self.needs = replace(read, gold=bool(self.gold_readers))
        self.keep_tail = self.preset.keep_tail
        kind, factor = self.preset.consistency, self.preset.consistency_weight
        self.consistency = ConsistencyTerm(factor, kind) if kind != "none" and factor > 0 else None

    def weights(self, pass_: Pass) -> Weights:
        """As in `Weigher`."""
        counts, validity = pass_.batch.counts, list[float]()
        if self._judged:  # known on the host, so that a GPU need not wait
            validity = [judgement.validity for judgement in judgements(pass_)]
        offsets = pass_.batch.problem_offsets
        return self._weigh(self._scores(pass_), offsets, counts, _idle(validity, counts))

    def check(self, weights: Weights, batch: Batch) -> None:
        """As in `Weigher`."""
        self._check(weights.scores, batch)

    def _check(self, scores: Mapping[str, Tensor], batch: Batch) -> None:
        for axis, metric in self.all_metrics.items():
            _check_finite(metric.name, axis, scores[axis], batch)
        self._check_validity(scores)

    def _check_validity(self, scores: Mapping[str, Tensor]) -> None:
        validity = scores.get(VALIDITY)
        if validity is not None and bool((validity < 0).any()):
            raise ValueError(
                f"validity of {self.preset.validity} must be >= 0, got {float(validity.min())}"
            )

    @property
    def all_metrics(self) -> dict[str, Metric]:
        """Axis -> metric of every axis in use, validity first."""
        return ({} if self.validity is None else {str(VALIDITY): self.validity}) | self.metrics

    def score(self, pass_: Pass) -> dict[str, Tensor]:
        """Returns axis -> [R] float32 scores, checked.

        Raises:
            ValueError: as in `Weigher.check`.
        """
        scores = self._scores(pass_)
        self._check(scores, pass_.batch)
        return scores

    def _scores(self, pass_: Pass) -> dict[str, Tensor]:
        """Returns axis -> [R] float32 scores, each checked to have this shape."""
        scores: dict[str, Tensor] = {}
        for axis, metric in self.all_metrics.items():
            scores[axis] = _shaped(metric.name, axis, metric.score(pass_).float(), pass_.batch)
        return scores

    def weigh(self, scores: Mapping[str, Tensor], offsets: Tensor) -> Weights:
        """Returns the weights for scores (axis -> [R]) of the problems of `offsets` [P + 1].

        Without a score of validity every validity is 1.

        Raises:
            ValueError: a validity is negative.
        """
        self._check_validity(scores)
        counts, validity = offsets.diff().tolist(), list[float]()
        if self._judged and VALIDITY in scores:
            validity = scores[VALIDITY].tolist()
        return self._weigh(scores, offsets, counts, _idle(validity, counts))

    def _weigh(
        self,
        scores: Mapping[str, Tensor],
        offsets: Tensor,
        counts: Sequence[int],
        idle: Sequence[bool],
    ) -> Weights:
        """Returns the weights of scores [R].

        Args:
            scores: axis -> [R].
            offsets: [P + 1] of the problems.
            counts: [P] rationales of each problem.
            idle: [R] what `_idle` returned.
        """
        if not any(idle):
            return self._weigh_all(scores, offsets)
        kept = [i for i, skip in enumerate(idle) if not skip]
        ends = list(accumulate(counts, initial=0))
        fewer = accumulate((idle[a:b].count(False) for a, b in pairwise(ends)), initial=0)
        index = put(kept, offsets, torch.int64)
        found = self._weigh_all(
            {axis: score[index] for axis, score in scores.items()},
            put(list(fewer), offsets, offsets.dtype),
        )

        def of_all(values: Tensor) -> Tensor:
            return values.new_zeros(len(idle)).index_copy(0, index, values)

        return Weights(
            of_all(found.weight),
            dict(scores),
            {axis: of_all(z) for axis, z in found.zscores.items()},
            self._usable(scores[VALIDITY], offsets),
        )

    def _weigh_all(self, scores: Mapping[str, Tensor], offsets: Tensor) -> Weights:
        preset = self.preset
        count = next(iter(scores.values())).numel() if scores else int(offsets[-1])
        problem, sizes = segment_of(offsets, count), offsets.diff()
        z: dict[str, Tensor] = {}
        axes = [axis for axis in scores if axis in self._beta]
        if axes:
            stacked = torch.stack([scores[axis] for axis in axes])
            constants = [*(self._beta[a] for a in axes), *(self._prior(a) for a in axes)]
            beta, prior = put(constants, stacked, stacked.dtype).chunk(2)
            weight, each = problem_weights(
                stacked,
                offsets,
                beta,
                prior,
                tau=preset.tau,
                ddof=preset.ddof,
                eps=preset.eps,
                floor=preset.floor,
            )
            z = dict(zip(axes, each.unbind(), strict=True))
        else:
            weight = 1.0 / sizes[problem].float()
        if self.problems_seen < preset.warmup:
            uniform = 1.0 / sizes[problem]
            weight = torch.lerp(uniform, weight, self.problems_seen / preset.warmup)
        usable = None
        if VALIDITY in scores:
            validity = scores[VALIDITY]
            product = weight * validity
            total = segment_sum(product, offsets)[problem]
            usable = self._usable(validity, offsets)
            weight = torch.where(total > 0, product / total.clamp(min=_TINY), weight)
        return Weights(weight, dict(scores), z, usable)

    def _usable(self, validity: Tensor, offsets: Tensor) -> Tensor:
        """Returns [R] whether the problem of a rationale is used, by the validities in it."""
        total = segment_sum(validity, offsets)[segment_of(offsets, validity.numel())]
        return total >= LEAST if self._judged else total > 0

    def _prior(self, axis: str) -> float:
        return self.preset.shrink * self.spread.get(axis, 0.0)

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Updates the running statistics with the scores of all problems of one optimizer step."""
        values = {axis: scores[axis].tolist() for axis in self._beta}
        validity = scores[VALIDITY].tolist() if self._judged and VALIDITY in scores else None
        variances: dict[str, list[float]] = {axis: [] for axis in values}
        seen = 0
        for first, end in pairwise(offsets.tolist()):
            kept: Sequence[int] = range(first, end)
            if validity is not None:
                wrong = _known_wrong(validity[first:end])
                kept = [k for k, is_wrong in zip(kept, wrong, strict=True) if not is_wrong]
            if len(kept) < 2:
                continue
            seen += 1
            for axis, score in values.items():
                variances[axis].append(_variance([score[k] for k in kept]))
        if not seen:
            return
        self.updates += 1
        self.problems_seen += seen
        # A plain mean over the first 1 / _MOMENTUM steps, then an exponential moving average.
        share = max(_MOMENTUM, 1.0 / self.updates)
        for axis, found in variances.items():
            std = math.sqrt(fmean(found))
            self.spread[axis] = (1.0 - share) * self.spread.get(axis, 0.0) + share * std

    def take_log(self) -> dict[str, float]:
        """Returns nothing: the weights and scores are logged by the trainer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the running statistics as plain numbers."""
        return {
            "spread": dict(self.spread),
            "updates": self.updates,
            "problems_seen": self.problems_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.spread = dict(state["spread"])
        self.updates = int(state["updates"])
        self.problems_seen = int(state["problems_seen"])


@dataclass
class PolicyWeigher(_Checked):
    """Weighs by a policy; its state is the number of optimizer steps and that of the policy."""

    name: str
    policy: Policy
    updates: int = 0
    needs: Needs = Needs()
    gold_readers: tuple[str, ...] = ()
    skips: Skips | None = None
    keep_tail: bool = False
    consistency: ConsistencyTerm | None = None
    teacher: str | None = None

    def weights(self, pass_: Pass) -> Weights:
        """As in `Weigher`."""
        scores: dict[str, Tensor] = {}
        with torch.no_grad():
            if isinstance(self.policy, StatefulPolicy):
                scores = self.policy.scores(pass_)
                weight = self.policy.weigh(scores, pass_).float()
            else:
                weight = self.policy(pass_, self.updates).float()
        return Weights(_shaped(self.name, "policy", weight, pass_.batch), scores, {})

    def check(self, weights: Weights, batch: Batch) -> None:
        """As in `Weigher`."""
        _check_finite(self.name, "policy", weights.weight, batch)
        if bool((weights.weight < 0).any()):  # it would be trained on in reverse
            raise ValueError(
                f"policy weights of {self.name} must be >= 0, got {float(weights.weight.min())}"
            )

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Counts an optimizer step, and updates a policy with state."""
        self.updates += 1
        if isinstance(self.policy, StatefulPolicy):
            self.policy.update(scores, offsets)

    def take_log(self) -> dict[str, float]:
        """Returns what a policy with state logs."""
        if not isinstance(self.policy, StatefulPolicy):
            return {}
        return {f"policy/{name}": value for name, value in self.policy.take_log().items()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the count of steps, and the state of the policy."""
        own = self.policy.state_dict() if isinstance(self.policy, StatefulPolicy) else {}
        return {"updates": self.updates} | ({"policy": own} if own else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.updates = int(state["updates"])
        if isinstance(self.policy, StatefulPolicy) and "policy" in state:
            self.policy.load_state_dict(state["policy"])


def make_weigher(name: str = DEFAULT_PRESET, **overrides: Any) -> Weigher:
    """Returns the weigher called `name`.

    Args:
        name: a preset (released, paper, robust), a policy (uniform, random, single:TEACHER,
            answer-vote, rejection and the others of docs/method.md), or one that was registered.
        overrides: fields of `Preset` (consensus="answer", tau=0.5), or arguments of the policy
            (`seed` of random, `teachers` of oracle).

    Raises:
        ValueError: if a name, an override or a metric is unknown (the message lists them), or the
            value of an override is not allowed.
    """
    if name in PRESETS:
        known = [f.name for f in fields(Preset)]
        for key in overrides:
            if key not in known:
                raise ValueError(f"override of {name} must be one of {known}, got {key!r}")
        try:
            preset = replace(PRESETS[name], **overrides)
        except ValueError as error:
            raise ValueError(f"override of {name}: {error}") from None
        return PresetWeigher(name, preset)
    policy, teacher = split_teacher(name)
    if policy not in POLICIES or (policy == SINGLE) != (teacher is not None):
        raise ValueError(unknown("preset", name, weigher_names()))
    if teacher is not None:
        overrides["teacher"] = teacher
    try:
        weigh = POLICIES[policy](**overrides)
    except (TypeError, ValueError) as error:
        raise ValueError(f"override of {name}: {error}") from None
    needs = getattr(weigh, "needs", Needs())
    readers = (policy,) if needs.gold else ()
    skips = getattr(weigh, "skips", None)
    return PolicyWeigher(
        name, weigh, needs=needs, gold_readers=readers, skips=skips, teacher=teacher
    )


def weigher_names() -> list[str]:
    """Returns the values allowed for `preset`: presets, then policies."""
    return [*PRESETS, *(f"{SINGLE}:TEACHER" if p == SINGLE else p for p in POLICIES)]


def _idle(validity: Sequence[float], counts: Sequence[int]) -> list[bool]:
    """Returns [R] whether a rationale has validity 0 beside others of more; [] without validity."""
    ends = list(accumulate(counts, initial=0)) if validity else []
    each = (validity[a:b] for a, b in pairwise(ends))
    return [v == 0.0 and any(own) for own in each for v in own]


def _shaped(metric: str, axis: str, score: Tensor, batch: Batch) -> Tensor:
    """Returns the score; raises ValueError if it does not have shape [R]."""
    if score.shape != (batch.num_rationales,):
        raise ValueError(
            f"{axis} score {metric} must have shape [R] = [{batch.num_rationales}], "
            f"got {list(score.shape)}"
        )
    return score


def _check_finite(metric: str, axis: str, score: Tensor, batch: Batch) -> None:
    """Raises ValueError if a score [R] is not finite."""
    finite = torch.isfinite(score)
    if bool(finite.all()):
        return
    bad = int((~finite).nonzero()[0])
    question = batch.problems[int(batch.on_host.problem[bad])].question_id
    raise ValueError(
        f"{axis} score {metric} must be finite, got {float(score[bad])} "
        f"for question {question}, teacher {batch.teachers[bad]}"
    )
