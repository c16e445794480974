"""The registry of metrics: one score per rationale, computed from a finished pass.

A metric is a function `(pass_: Pass) -> Tensor [R]`, higher meaning more of its axis. To add one,

    @register("my-metric", axis="consensus")
    def my_metric(pass_: Pass) -> Tensor: ...

in any module that is imported before training, and use its name as the metric of an axis in a
preset. A metric reads the results of the one forward pass. It cannot run the student again: the
student is locked while a metric scores. Adaptability and consensus raise a weight; difficulty
lowers it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compact.passes import Pass
from compact.registry import Registry, unknown

Axis = Literal["adaptability", "consensus", "difficulty"]
AXES: tuple[Axis, ...] = ("adaptability", "consensus", "difficulty")

# Each file registers one metric, or variants of one, and states the formula and its source.
_BUILT_IN = (
    *("gain", "hsic", "probe", "probe_released"),
    *("agreement", "answer", "attention", "gold_weighted", "step_graph"),
    *("option_contrast", "leak_adjusted", "posterior_consensus"),
    *("nll",),
)


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes:
        name: the name that users write.
        axis: the axis that it can be used for.
        score: the function from a pass to [R] float scores.
        needs_leaves: it reads `Pass.leaf_logp`, so the batch must be built with answer leaves.
        needs_padded: it needs the padded layout, one row per rationale, as in the released code.
        needs_leaf_hidden: it also reads `Pass.leaf_hidden`. Leaves kept from an earlier step do not
            suffice, so the trainer refuses it with leaf_every > 1.
        needs_options: it reads `Pass.option_logp`, so problems must be encoded, and the batch
            built, with option leaves. The trainer refuses it with leaf_every > 1.
    """

    name: str
    axis: Axis
    score: Callable[[Pass], Tensor]
    needs_leaves: bool = False
    needs_padded: bool = False
    needs_leaf_hidden: bool = False
    needs_options: bool = False


METRICS: Registry[Metric] = Registry("metric")


def register(
    name: str,
    *,
    axis: Axis,
    needs_leaves: bool = False,
    needs_padded: bool = False,
    needs_leaf_hidden: bool = False,
    needs_options: bool = False,
) -> Callable[[Callable[[Pass], Tensor]], Callable[[Pass], Tensor]]:
    """Returns a decorator that registers a function as metric `name` of `axis`.

    The other arguments are those of `Metric`.

    Raises:
        ValueError: if the axis is unknown or the name is taken by another function.
    """
    if axis not in AXES:
        raise ValueError(f"register: axis must be one of {', '.join(AXES)}, got {axis!r}")

    def add(score: Callable[[Pass], Tensor]) -> Callable[[Pass], Tensor]:
        metric = Metric(
            name=name,
            axis=axis,
            score=_without_forward(name, score),
            needs_leaves=needs_leaves or needs_leaf_hidden,
            needs_padded=needs_padded,
            needs_leaf_hidden=needs_leaf_hidden,
            needs_options=needs_options,
        )
        METRICS.add(name, metric, score)
        return score

    return add


def _without_forward(name: str, score: Callable[[Pass], Tensor]) -> Callable[[Pass], Tensor]:
    """Returns `score` without gradient, and with the student locked while it runs.

    Raises, when called:
        RuntimeError: if the metric runs the student.
    """

    def refuse(*_: object) -> None:
        raise RuntimeError(
            f"metric {name} must not run the student: it must score the results of the pass"
        )

    @functools.wraps(score)
    def locked(pass_: Pass) -> Tensor:
        modules = (pass_.student.model, pass_.student.body)
        locks = [module.register_forward_pre_hook(refuse) for module in modules]
        try:
            with torch.no_grad():
                return score(pass_)
        finally:
            for lock in locks:
                lock.remove()

    return locked


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
