"""The registry of metrics: one score per rationale, computed from a finished pass.

A metric is a function `(pass_: Pass) -> Tensor [R]`, higher meaning more of its axis. To add one,

    @register("my-metric", axis="consensus")
    def my_metric(pass_: Pass) -> Tensor: ...

in any module that is imported before training, and use its name as the metric of an axis in a
preset. A metric reads the results of the one forward pass. It cannot run the student again: the
student is locked while a metric scores. Adaptability and consensus raise a weight; difficulty
lowers it; validity, >= 0, multiplies it. A metric of the axis "control" cannot be part of a preset:
it is there so that every comparison of metrics shows what length, chance or a count of words would
reach.

In a problem without a gold answer, a metric that needs one gives every rationale the score 0. Equal
scores have z-score 0, so the axis has no effect on the weights of that problem.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compact.passes import Needs, Pass
from compact.registry import Registry, unknown
from compact_ops import STATISTICS

Axis = Literal["validity", "adaptability", "consensus", "difficulty", "control"]
VALIDITY: Axis = "validity"
COMPATIBILITY: tuple[Axis, ...] = ("adaptability", "consensus", "difficulty")
"""The axes of COMPACT: how well a rationale suits this student and the other rationales."""
AXES: tuple[Axis, ...] = (VALIDITY, *COMPATIBILITY)
"""The axes of a preset: validity multiplies the weight that the others give."""
CONTROL: Axis = "control"
Direction = Literal["higher", "lower"]
TOKEN_MEAN = "mean over tokens; mean over rationales"
RATIONALE_MEAN = "one value per rationale; mean over rationales"

# Each file registers one metric, or variants of one, and states the formula and its source.
_BUILT_IN = (
    *("gain", "hsic", "probe", "probe_released", "answer_gain", "grape", "aslec", "lark"),
    *("agreement", "answer", "attention", "gold_weighted", "step_graph"),
    *("option_contrast", "leak_adjusted", "posterior_consensus"),
    *("judged", "nll", "rsr", "scas_final", "scas", "lalp"),
    *("length", "steps", "random", "checking_words", "uncertain_tokens"),
)


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: the name that users write.
        axis: the axis that it can be used for; "control" is none of a preset's.
        score: the function from a pass to [R] float scores.
        needs: what it reads.
        pooled: its scores depend on which problems share the pass, so weights made of them would
            depend on the micro-batches: it cannot be part of a preset.
        runs_student: it runs the student itself: a second pass, which costs as much as the first.
        direction: which scores are better for a student, "higher" or "lower".
        aggregation: how token values become the score of a rationale, and how the scores of a
            teacher's rationales become the score of the teacher.
    """

    name: str
    axis: Axis
    score: Callable[[Pass], Tensor]
    needs: Needs = Needs()
    pooled: bool = False
    runs_student: bool = False
    direction: Direction = "higher"
    aggregation: str = RATIONALE_MEAN

    @property
    def costs(self) -> tuple[str, ...]:
        """What the metric costs in addition to the pass, in words; () if it is free."""
        costs = {
            "answer leaves": self.needs.leaves,
            "option leaves": self.needs.options,
            "padded rows": self.needs.padded,
            "a second pass": self.runs_student,
        }
        return tuple(cost for cost, is_so in costs.items() if is_so)


METRICS: Registry[Metric] = Registry("metric")


def register(
    name: str,
    *,
    axis: Axis,
    needs_student: bool = True,
    needs_leaves: bool = False,
    needs_padded: bool = False,
    needs_leaf_hidden: bool = False,
    needs_options: bool = False,
    statistics: Sequence[str] = (),
    needs_gold: bool = False,
    needs_judgements: bool = False,
    pooled: bool = False,
    runs_student: bool = False,
    direction: Direction | None = None,
    aggregation: str = RATIONALE_MEAN,
) -> Callable[[Callable[[Pass], Tensor]], Callable[[Pass], Tensor]]:
    """Returns a decorator that registers a function as metric `name` of `axis`.

    The other arguments are those of `Metric` and `Needs`. The axis implies the direction: "lower"
    for difficulty, else "higher". Only a control may say otherwise.

    Raises:
        ValueError: if the axis, the direction or a statistic is unknown, axis and direction
            contradict each other, or the name is taken by another function.
    """
    for statistic in statistics:
        if statistic not in STATISTICS:
            raise ValueError(unknown("register: statistics", statistic, STATISTICS))
    axes = (*AXES, CONTROL)
    if axis not in axes:
        raise ValueError(f"register: axis must be one of {', '.join(axes)}, got {axis!r}")
    implied: Direction = "lower" if axis == "difficulty" else "higher"
    allowed = ("higher", "lower") if axis == CONTROL else (implied,)
    if direction is not None and direction not in allowed:
        raise ValueError(
            f"register: direction of {name} must be {' or '.join(allowed)} for axis {axis}, "
            f"got {direction!r}"
        )

    def add(score: Callable[[Pass], Tensor]) -> Callable[[Pass], Tensor]:
        metric = Metric(
            name=name,
            axis=axis,
            score=_guarded(name, score, tuple(statistics), runs_student),
            needs=Needs(
                student=needs_student,
                leaves=needs_leaves or needs_leaf_hidden,
                leaf_hidden=needs_leaf_hidden,
                options=needs_options,
                padded=needs_padded,
                judgements=needs_judgements,
                gold=needs_gold,
                statistics=tuple(statistics),
            ),
            pooled=pooled,
            runs_student=runs_student,
            direction=direction or implied,
            aggregation=aggregation,
        )
        METRICS.add(name, metric, score)
        return score

    return add


def _guarded(
    name: str,
    score: Callable[[Pass], Tensor],
    statistics: tuple[str, ...],
    runs_student: bool,
) -> Callable[[Pass], Tensor]:
    """Returns `score` without gradient, and with the student locked unless it may run it.

    Raises, when called:
        RuntimeError: if the metric runs the student without having said so.
        ValueError: if the pass was run without the statistics that the metric reads.
    """

    def refuse(*_: object) -> None:
        raise RuntimeError(
            f"metric {name} must not run the student: it must score the results of the pass, or "
            "be registered with runs_student=True"
        )

    @functools.wraps(score)
    def guarded(pass_: Pass) -> Tensor:
        for statistic in statistics:
            if getattr(pass_.stats, statistic) is None:
                raise ValueError(
                    f"metric {name}: the pass must be run with statistics={statistics}, "
                    f"got none of {statistic!r}"
                )
        modules = () if runs_student else (pass_.student.model, pass_.student.body)
        locks = [module.register_forward_pre_hook(refuse) for module in modules]
        try:
            with torch.no_grad():
                return score(pass_)
        finally:
            for lock in locks:
                lock.remove()

    return guarded


def get_metric(name: str, axis: Axis | None = None) -> Metric:
    """Returns the metric `name`.

    Raises:
        ValueError: if it is unknown or does not belong to `axis`; the message lists the known
            names.
    """
    names = metric_names(axis)
    if name not in names:
        what = "metric" if axis is None else f"metric of {axis}"
        raise ValueError(unknown(what, name, names))
    return METRICS[name]


def metric_names(axis: Axis | None = None) -> list[str]:
    """Returns the sorted names of all metrics, or of those of one axis."""
    return sorted(name for name, m in METRICS.items() if axis in (None, m.axis))


for _name in _BUILT_IN:
    importlib.import_module(f"compact.metrics.{_name}")
