"""Presets: which metrics give the weights, and with which settings.

To add a preset, write a function without arguments that returns a `Preset`:

    @register_preset("mine")
    def mine() -> Preset:
        return Preset("gain", "answer", "nll", tau=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compact.metrics import COMPATIBILITY, METRICS
from compact.options import check_number
from compact.registry import Registry


@dataclass(frozen=True)
class Preset:
    """The metrics and settings of a weighting; every field can be overridden by name.

    Attributes:
        adaptability, consensus, difficulty: the metric of each axis, or "none".
        validity: the metric that multiplies the weight, or "none".
        beta: factors (adaptability, consensus, difficulty); difficulty is subtracted.
        ddof: degrees of freedom subtracted from K in the variance.
        eps: if > 0, it is added to the standard deviation, and s0 is not used.
        shrink: s0 in units of the running within-problem standard deviation.
        tau: temperature of the softmax.
        floor: share of the weight that is divided equally among the rationales, but for those that
            are `judged` to be wrong.
        warmup: problems over which the weights move from uniform to alpha.
        consistency: kind of the consistency term, "positions", "answer" or "none".
        consistency_weight: its factor lambda.
        keep_tail: whether the tokens that the chat template writes after the end of turn (a newline
            in ChatML) belong to the rationale: they are scored and trained on.
    """

    adaptability: str
    consensus: str
    difficulty: str
    beta: tuple[float, float, float] = (1.0, 1.0, 0.5)
    ddof: int = 0
    eps: float = 0.0
    shrink: float = 0.0
    tau: float = 1.0
    floor: float = 0.0
    warmup: int = 0
    consistency: str = "none"
    consistency_weight: float = 0.1
    keep_tail: bool = False
    validity: str = "none"

    def __post_init__(self) -> None:
        """Checks the values, which a recipe may set.

        Raises:
            ValueError: a value is not allowed; the message names the field.
        """
        if not isinstance(self.beta, Sequence) or len(self.beta) != 3:
            raise ValueError(f"beta must be three numbers, got {self.beta!r}")
        for factor in self.beta:
            check_number("beta: each factor", factor)
        object.__setattr__(self, "beta", tuple(self.beta))
        check_number("ddof", self.ddof, least=0, most=1, whole=True)
        check_number("tau", self.tau, least=1e-6)
        check_number("floor", self.floor, least=0, most=1)
        for name in ("eps", "shrink", "warmup", "consistency_weight"):
            check_number(name, getattr(self, name), least=0)
        if not isinstance(self.keep_tail, bool):
            raise ValueError(f"keep_tail must be true or false, got {self.keep_tail!r}")
        kinds = ("positions", "answer", "none")
        if self.consistency not in kinds:
            raise ValueError(
                f"consistency must be one of {', '.join(kinds)}, got {self.consistency!r}"
            )
        for axis in COMPATIBILITY:
            name = getattr(self, axis)
            if name in METRICS and METRICS[name].pooled:
                raise ValueError(
                    f"{axis} must not be {name} in a preset, since its scores depend on which "
                    "problems share a micro-batch; `compact metrics` has it"
                )


PRESETS: Registry[Preset] = Registry("preset")


def register_preset(name: str) -> Callable[[Callable[[], Preset]], Callable[[], Preset]]:
    """Returns a decorator that registers the preset that a function returns as `name`.

    Raises:
        ValueError: when applied, if the name is taken or a value of the preset is not allowed.
    """

    def add(make: Callable[[], Preset]) -> Callable[[], Preset]:
        PRESETS.add(name, make(), make)
        return make

    return add


@register_preset("released")
def released() -> Preset:
    """The weights of the public training code."""
    return Preset(
        *("probe-released", "attention", "nll"),
        ddof=1,
        eps=1e-4,
        consistency="positions",
        keep_tail=True,
    )


@register_preset("paper")
def paper() -> Preset:
    """The weights described in the abstract and the published figure."""
    return Preset("probe", "step-graph", "nll", ddof=1, eps=1e-4, consistency="answer")


@register_preset("robust")
def robust() -> Preset:
    """The default: what the texts say about right and wrong, then what suits the student."""
    return Preset(
        "gain", "agreement", "nll", validity="judged", beta=(0.5, 1.0, 0.0), shrink=0.5, tau=2.5
    )
