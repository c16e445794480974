"""Turns scores into one weight per rationale, with the presets of COMPACT or with policies.

The z-score over the K rationales of a problem is z(S) = (S - mean) / sqrt(var + s0^2), where s0 =
shrink x the running within-problem standard deviation. u = sum_s beta_s z_s, with a negative beta
for difficulty. alpha = softmax(r u / tau), mixed with the uniform weight by floor and warm-up. r is
the running reliability of u if the preset is `reliable`, else 1. Weights have no gradient, are >= 0
and sum to 1 over each problem; K = 1 gives 1.

Reliability. Noise has z-scores as large as signal, so a z-score alone does not show whether a
difference is real. Axes that measure the same quality in different ways agree; noise does not. So r
is Cronbach's alpha of the n axes in use (Cronbach, Psychometrika 1951), r = n/(n-1)
(1 - sum_s var(beta_s z_s) / var(u)) >= 0, and r u is the best linear estimate of the quality from u
(Kelley's formula). r starts as if _DOUBT problems without any agreement had been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compact.metrics import AXES, Metric, get_metric
from compact.passes import Pass
from compact.passes.segments import segment_mean, segment_of
from compact.registry import unknown
from compact.weighting.consistency import ConsistencyTerm
from compact.weighting.policies import POLICIES, SINGLE, split_teacher
from compact.weighting.presets import DEFAULT_PRESET, PRESETS, Preset
from compact_ops import problem_weights


class Weights(NamedTuple):
    """The weights that a weigher gives to a pass, with the scores behind them.

    Attributes:
        weight: [R] float32, sums to 1 over each problem (all 0 if a policy skips it).
        scores: axis -> [R] the raw score; empty for policies.
        zscores: axis -> [R] the score standardised within its problem; empty for policies.
    """

    weight: Tensor
    scores: dict[str, Tensor]
    zscores: dict[str, Tensor]


class Weigher(Protocol):
    """The interface of presets and policies for the trainer and other callers.

    Attributes:
        name: preset or policy, as the user wrote it.
        needs_leaves: it reads answer leaves.
        needs_options: it reads option leaves.
        needs_padded: it needs the padded layout, one row per rationale.
        leaf_hidden_readers: metrics that read the hidden states of leaves.
        consistency: the consistency term to add to the loss, or None.
        teacher: the only teacher whose rationales it uses; None if it uses all.
    """

    name: str
    needs_leaves: bool
    needs_options: bool
    needs_padded: bool
    leaf_hidden_readers: tuple[str, ...]
    consistency: ConsistencyTerm | None
    teacher: str | None

    def __call__(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass; changes no state."""

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Updates the running statistics with the scores of one optimizer step.

        The scores are those of all problems on all ranks, in data order.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the running statistics as plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


# Share of one optimizer step in the running statistics.
_MOMENTUM = 0.05
# The reliability starts as if it had seen this many problems without agreement of the axes.
_DOUBT = 16


def zscores(scores: Tensor, offsets: Tensor, *, ddof: int, eps: float, prior_std: float) -> Tensor:
    """Returns [R] z-scores within each problem; 0 if a problem has one rationale.

    Args:
        scores: [R] float.
        offsets: [P + 1] offsets of each problem's rationales.
        ddof: degrees of freedom subtracted from K in the variance.
        eps: if > 0, z = (s - mean) / (std + eps), else z = (s - mean) / sqrt(var + prior_std^2).
        prior_std: s0, in the score's units.
    """
    problem = segment_of(offsets)
    centred = scores - segment_mean(scores, offsets)[problem]
    var = within_variance(scores, offsets, ddof)[problem]
    scale = var.sqrt() + eps if eps > 0 else (var + prior_std**2).sqrt()
    # With equal scores the scale is 0 and the differences are rounding errors: return 0.
    return torch.where(scale > 0, centred / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)


def within_variance(scores: Tensor, offsets: Tensor, ddof: int = 0) -> Tensor:
    """Returns [P] variances of scores [R] within each problem; 0 where K <= ddof."""
    sizes = offsets.diff()
    centred = scores - segment_mean(scores, offsets)[segment_of(offsets)]
    mean_square = segment_mean(centred.square(), offsets)
    return mean_square * sizes / (sizes - ddof).clamp(min=1)


@dataclass
class PresetWeigher:
    """Weighs by the three axes of a preset; its state is the running spread and reliability.

    Attributes:
        spread: axis -> running within-problem standard deviation of its score.
        item_variance: running sum over the axes of the mean square of beta_s z_s.
        total_variance: running mean square of u.
        updates: optimizer steps seen.
        problems_seen: problems with two or more rationales seen.
    """

    name: str
    preset: Preset
    spread: dict[str, float] = field(default_factory=dict)
    item_variance: float = 0.0
    total_variance: float = 0.0
    updates: int = 0
    problems_seen: int = 0
    teacher: str | None = None

    def __post_init__(self) -> None:
        self.metrics: dict[str, Metric] = {
            axis: get_metric(getattr(self.preset, axis), axis)
            for axis in AXES
            if getattr(self.preset, axis) != "none"
        }
        self.needs_leaves = any(m.needs_leaves for m in self.metrics.values())
        self.needs_options = any(m.needs_options for m in self.metrics.values())
        self.needs_padded = any(m.needs_padded for m in self.metrics.values())
        self.leaf_hidden_readers = tuple(
            m.name for m in self.metrics.values() if m.needs_leaf_hidden
        )
        signed = zip(AXES, (1.0, 1.0, -1.0), self.preset.beta, strict=True)
        self._beta = {str(axis): sign * beta for axis, sign, beta in signed if axis in self.metrics}
        if self.preset.reliable and sum(b != 0 for b in self._beta.values()) < 2:
            raise ValueError(
                f"{self.name}: reliable needs two axes with a metric and beta != 0, "
                f"got metrics {list(self.metrics)} with beta {self.preset.beta}"
            )
        kind, factor = self.preset.consistency, self.preset.consistency_weight
        self.consistency = ConsistencyTerm(factor, kind) if kind != "none" and factor > 0 else None

    def __call__(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass, with the current running statistics.

        Raises:
            ValueError: if a score is not finite, naming metric, question and teacher.
        """
        scores = self.score(pass_)
        return self.weigh(scores, pass_.batch.problem_offsets)

    def score(self, pass_: Pass) -> dict[str, Tensor]:
        """Returns axis -> [R] float32 scores, each checked to be finite."""
        scores: dict[str, Tensor] = {}
        for axis, metric in self.metrics.items():
            score = metric.score(pass_).float()
            finite = torch.isfinite(score)
            if score.shape != (pass_.batch.num_rationales,) or not bool(finite.all()):
                raise ValueError(_unusable(metric.name, axis, score, pass_))
            scores[axis] = score
        return scores

    def weigh(self, scores: Mapping[str, Tensor], offsets: Tensor) -> Weights:
        """Returns the weights for scores (axis -> [R]) of the problems of `offsets` [P + 1]."""
        preset = self.preset
        z = self._zscores(scores, offsets)
        stacked = torch.stack(list(scores.values()))
        weight = problem_weights(
            stacked,
            offsets,
            stacked.new_tensor([self._beta[axis] * self.reliability for axis in scores]),
            stacked.new_tensor([self._prior(axis) for axis in scores]),
            tau=preset.tau,
            ddof=preset.ddof,
            eps=preset.eps,
            floor=preset.floor,
        )
        if self.problems_seen < preset.warmup:
            uniform = 1.0 / offsets.diff()[segment_of(offsets)]
            weight = torch.lerp(uniform, weight, self.problems_seen / preset.warmup)
        return Weights(weight, dict(scores), z)

    @property
    def reliability(self) -> float:
        """The running reliability r of u in 0..1; 1 if the preset is not `reliable`."""
        if not self.preset.reliable:
            return 1.0
        if self.total_variance == 0.0:
            return 0.0
        axes = sum(beta != 0 for beta in self._beta.values())
        alpha = axes / (axes - 1) * (1.0 - self.item_variance / self.total_variance)
        return max(alpha, 0.0) * self.problems_seen / (self.problems_seen + _DOUBT)

    def _prior(self, axis: str) -> float:
        return self.preset.shrink * self.spread.get(axis, 0.0)

    def _zscores(self, scores: Mapping[str, Tensor], offsets: Tensor) -> dict[str, Tensor]:
        ddof, eps = self.preset.ddof, self.preset.eps
        return {
            axis: zscores(score, offsets, ddof=ddof, eps=eps, prior_std=self._prior(axis))
            for axis, score in scores.items()
        }

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Updates the running statistics with the scores of all problems of one optimizer step."""
        several = offsets.diff() > 1
        if not bool(several.any()):
            return
        self.updates += 1
        self.problems_seen += int(several.sum())
        # A plain mean over the first 1 / _MOMENTUM steps, then an exponential moving average.
        share = max(_MOMENTUM, 1.0 / self.updates)
        for axis, score in scores.items():
            std = float(within_variance(score.double(), offsets)[several].mean()) ** 0.5
            self.spread[axis] = (1.0 - share) * self.spread.get(axis, 0.0) + share * std
        several_rationales = several[segment_of(offsets)]
        items = torch.stack(
            [
                self._beta[axis] * z.double()[several_rationales]
                for axis, z in self._zscores(scores, offsets).items()
            ]
        )
        item, total = float(items.square().sum(0).mean()), float(items.sum(0).square().mean())
        self.item_variance = (1.0 - share) * self.item_variance + share * item
        self.total_variance = (1.0 - share) * self.total_variance + share * total

    def state_dict(self) -> dict[str, Any]:
        """Returns the running statistics as plain numbers."""
        return {
            "spread": dict(self.spread),
            "item_variance": self.item_variance,
            "total_variance": self.total_variance,
            "updates": self.updates,
            "problems_seen": self.problems_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.spread = dict(state["spread"])
        self.item_variance = float(state["item_variance"])
        self.total_variance = float(state["total_variance"])
        self.updates = int(state["updates"])
        self.problems_seen = int(state["problems_seen"])


@dataclass
class PolicyWeigher:
    """Weighs by a policy; its only state is the number of optimizer steps."""

    name: str
    policy: Callable[[Pass, int], Tensor]
    updates: int = 0
    needs_leaves: bool = False
    needs_options: bool = False
    needs_padded: bool = False
    leaf_hidden_readers: tuple[str, ...] = ()
    consistency: ConsistencyTerm | None = None
    teacher: str | None = None

    def __call__(self, pass_: Pass) -> Weights:
        """Returns the weights of a pass.

        Raises:
            ValueError: if a weight is not finite, naming question and teacher.
        """
        with torch.no_grad():
            weight = self.policy(pass_, self.updates).float()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(_unusable(self.name, "policy", weight, pass_))
        return Weights(weight, {}, {})

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Counts an optimizer step."""
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the count of steps."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.updates = int(state["updates"])


def make_weigher(name: str = DEFAULT_PRESET, **overrides: Any) -> Weigher:
    """Returns the weigher called `name`.

    Args:
        name: a preset (released, paper, robust), a policy (uniform, random, single:TEACHER,
            answer-vote, softmax-nll, ca-mkd, ebkd, oracle), or one that was registered.
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
        raise ValueError(unknown("weigher", name, weigher_names()))
    if teacher is not None:
        overrides["teacher"] = teacher
    try:
        return PolicyWeigher(name, POLICIES[policy](**overrides), teacher=teacher)
    except TypeError as error:
        raise ValueError(f"override of {name}: {error}") from None


def weigher_names() -> list[str]:
    """Returns the values allowed for `preset`: presets, then policies."""
    return [*PRESETS, *(f"{SINGLE}:TEACHER" if p == SINGLE else p for p in POLICIES)]


def _unusable(metric: str, axis: str, score: Tensor, pass_: Pass) -> str:
    batch = pass_.batch
    if score.shape != (batch.num_rationales,):
        shape = list(score.shape)
        return f"{axis} score {metric} must have shape [R] = [{batch.num_rationales}], got {shape}"
    bad = int((~torch.isfinite(score)).nonzero()[0])
    question = batch.problems[int(batch.problem[bad])].question_id
    return (
        f"{axis} score {metric} must be finite, got {float(score[bad])} "
        f"for question {question}, teacher {batch.teachers[bad]}"
    )
