"""A strategy is a distillation method, written as hooks that the trainer calls in a run.

To add a strategy, write one class with the hooks that it needs:

    @register_strategy("mine")
    class Mine(Strategy):
        needs = ("gold",)

        def loss_terms(self):
            return [Term("mine", self.term)]

`strategy: mine` in a recipe selects it. `strategy_options` are the arguments of its constructor.
The weights of the teachers are a separate choice (`preset`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from compact.passes import EncodedProblem, Pass
from compact.registry import Registry

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.passes.lazily import LazyProblems
    from compact.student import Student
    from compact.weighting import Weigher, Weights


logger = logging.getLogger(__name__)


class LossTerm(Protocol):
    """A term that is added to the loss of a micro-batch."""

    @property
    def name(self) -> str:
        """What an error calls the term."""

    def __call__(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns the sum of the term over the problems of the pass, a float32 scalar.

        Args:
            hidden: [B, L, H] final hidden states of the main block, with their graph.
            pass_: the results of the forward, detached.
            weight: [R] weights of the rationales, without gradient; 0 for problems that are not
                counted.
        """


@dataclass(frozen=True)
class Term:
    """A loss term made of a function, such as a method of the strategy.

    Attributes:
        name: what an error calls the term.
        function: as `LossTerm.__call__`.
    """

    name: str
    function: Callable[[Tensor, Pass, Tensor], Tensor]

    def __call__(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns what the function returns."""
        return self.function(hidden, pass_, weight)


class Strategy:
    """A distillation method. The hooks of this class do nothing; a subclass overrides some.

    Attributes:
        needs: what the method needs: "gold", "rollouts", "white-box teacher", "writer",
            "K x compute".
        needs_whole_model: it reads or writes parameters, generates, or runs the student more often
            on some processes than on others; refused with FSDP and with DeepSpeed.
        nll_factor: factor on the weighted negative log-likelihood of the rationales.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    needs_whole_model: ClassVar[bool] = False
    nll_factor: float = 1.0

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Called once, before anything is loaded. May keep settings.

        Raises:
            ValueError: the method makes no sense with this weigher or these settings.
        """

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Returns the problems to train on. Called once, before the first step.

        Args:
            problems: the problems that the trainer was given.
            model: the student, with its adapters.
            processing_class: its tokenizer.
        """
        return problems

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Called once before the first step of this process, after a checkpoint was loaded.

        Args:
            model: the student, with its adapters.
            total_steps: optimizer steps of the whole run.
        """

    def data_step(self, step: int) -> int:
        """Returns the number of the step whose problems step `step` trains on, both from 0."""
        return step

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Returns the problems that replace those of a micro-batch, as many and in their order.

        Called for each micro-batch in training, not in evaluation. Other problems of the data may
        replace them.
        """
        return problems

    def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
        """Returns the weights [R] to train with; 0 for all rationales leaves a problem out.

        Called for each micro-batch in training, not in evaluation, without gradient.

        Args:
            pass_: the results of the forward, detached.
            weights: the weights of the preset or policy, with their scores.
        """
        return weights.weight

    def knows(self, teacher: str) -> bool:
        """Returns whether an evaluation can include this teacher's rationales in its loss.

        If not, the other rationales of the problem share its whole weight.
        """
        return True

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the terms to add to the loss of every micro-batch. Called once."""
        return ()

    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Called after each optimizer step; `step` is its number, counted from 1."""

    def take_log(self) -> dict[str, float]:
        """Returns named numbers for a line of the training log, of the steps since the last one.

        `compact report` draws a chart of each; those of one group ("switches/mean") share a chart.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs: names with JSON values or tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `state_dict` returned; tensors are on the CPU."""


def check_markers(
    strategy: str, problems: LazyProblems, then: str, *, only_right: bool = False
) -> None:
    """Warns of rationales without an answer marker, where a method would learn nothing.

    Args:
        strategy: the name of the method.
        problems: the problems, of which the sample is read.
        then: what becomes of rationales without a marker.
        only_right: whether the method learns from right rationales only.

    Raises:
        ValueError: none has a marker.
    """
    markers = [
        r.marker < len(r.ids)
        for problem in problems.sample
        for r, right in zip(problem.rationales, problem.right, strict=True)
        if right or not only_right
    ]
    what = "right rationales" if only_right else "rationales"
    where = "an answer marker, such as 'The answer is', within max_length"
    if not any(markers):
        raise ValueError(
            f"strategy {strategy}: one of the {what} must have {where}, got none among "
            f"{len(markers)} {what}"
        )
    if not all(markers):
        logger.warning(
            "%s: %d of %d %s lack %s; %s",
            *(strategy, markers.count(False), len(markers), what, where, then),
        )


STRATEGIES: Registry[type[Strategy]] = Registry("strategy")
register_strategy = STRATEGIES.register


def sum_over_ranks(values: Sequence[float], model: nn.Module) -> list[float]:
    """Returns the sum of each value over all ranks; nccl needs them on the model's device."""
    device = next(model.parameters()).device
    found: list[float] = reduce(
        torch.tensor(values, dtype=torch.float64, device=device), "sum"
    ).tolist()
    return found


def make_strategy(name: str | None, options: Mapping[str, Any] | None = None) -> Strategy:
    """Returns the strategy `name`; for None, one whose hooks do nothing.

    Raises:
        ValueError: the name is unknown, or the strategy does not take the options.
    """
    if name is None:
        if options:
            raise ValueError(
                f"strategy must be given with strategy_options, got None with {dict(options)!r}"
            )
        return Strategy()
    try:
        return STRATEGIES.get_or_raise(name)(**(options or {}))
    except TypeError as error:
        raise ValueError(f"strategy_options of {name}: {error}") from None
