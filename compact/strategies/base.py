"""The seams of the trainer: a strategy is a distillation method as hooks of one training run.

A strategy of your own is one class with the hooks that it needs:

    @register_strategy("mine")
    class Mine(Strategy):
        needs = ("gold",)

        def loss_terms(self):
            return [my_term]

`strategy: mine` in a recipe uses it; `strategy_options` are the arguments of its constructor. How
teachers are weighed is a separate choice (`preset`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from compact.passes import EncodedProblem, Pass
from compact.registry import Registry

if TYPE_CHECKING:
    from compact.data import Problem
    from compact.student import Student


class LossTerm(Protocol):
    """Something that adds to the loss of a micro-batch."""

    name: ClassVar[str]

    def __call__(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns the term summed over the problems of the pass, a float32 scalar.

        Args:
            hidden: [B, L, H] final hidden states of the main block, with their graph.
            pass_: what the forward left behind, detached.
            weight: [R] weights of the rationales, without gradient; 0 for problems that are not
                counted.
        """


class Strategy:
    """A distillation method; each hook does nothing unless a subclass says otherwise.

    Attributes:
        needs: what the method needs, for `compact strategies`: "gold", "rollouts",
            "white-box teacher", "endpoint".
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Returns the problems to train on, once, before the first step.

        Args:
            problems: as given to the trainer.
            model: the student, with its adapters.
            processing_class: its tokenizer.
        """
        return problems

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Returns the problems of a micro-batch as they are packed: as many, with the same ids.

        Not called in evaluation.
        """
        return problems

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the terms that are added to the loss of every micro-batch."""
        return ()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Runs after the optimizer step number `step`, counted from 1."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


STRATEGIES: Registry[type[Strategy]] = Registry("strategy")
register_strategy = STRATEGIES.register


def make_strategy(name: str | None, options: Mapping[str, Any] | None = None) -> Strategy:
    """Returns the strategy `name`; the one that does nothing for None.

    Raises:
        ValueError: an unknown name, or options that it does not take.
    """
    if name is None:
        if options:
            raise ValueError(f"strategy_options need a strategy, got {dict(options)!r}")
        return Strategy()
    try:
        return STRATEGIES.get_or_raise(name)(**(options or {}))
    except TypeError as error:
        raise ValueError(f"strategy_options of {name}: {error}") from None
