"""An optimizer step over its micro-batches: records, non-finite values, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from compact.strategies import Strategy
from compact.student.internals import foreach_multiply
from compact.trainer.batches import Item
from compact.trainer.outcome import GradientCheck, Outcome
from compact.trainer.records import NonFiniteError, ProblemRecord, named, own_part


class StrategySteps(TrainerCallback):
    """Calls the strategy before the first optimizer step and after each one."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Calls the strategy; the model has the weights of the checkpoint that is resumed."""
        self.strategy.begin(model, state.max_steps)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Calls the strategy; `state.global_step` includes the step that has just ended."""
        self.strategy.after_step(model, state.global_step, optimizer)


class LeftOutSteps(TrainerCallback):
    """Lets the optimizer pass over a step without changing a parameter, or the loss scale of fp16.

    GradScaler.step asserts that it has seen a gradient, so it is kept out of such a step.
    """

    def __init__(self) -> None:
        self._without: tuple[Any, Any] | None = None  # an optimizer and its scaler

    def leave_out(self, model: nn.Module, optimizer: Any) -> None:
        """Removes the gradients of the step that is about to be taken."""
        clear_gradients(model)
        if getattr(optimizer, "scaler", None) is not None:
            self._without, optimizer.scaler = (optimizer, optimizer.scaler), None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Gives the optimizer its scaler back; transformers has called `step`."""
        if self._without is not None:
            optimizer, scaler = self._without
            optimizer.scaler, self._without = scaler, None
            scaler.update(scaler.get_scale())  # ready for the next step, at the same scale


Gradients = dict[nn.Parameter, Tensor | None]


@dataclass
class Micro:
    """A micro-batch of the current step.

    Attributes:
        items: its problems.
        outcome: the results of its forward; None if they are left out.
        gradients: the check of the gradients after its backward; None if there is none.
    """

    items: Sequence[Item] = ()
    outcome: Outcome | None = None
    gradients: GradientCheck | None = None

    def records(self) -> list[ProblemRecord]:
        """Returns the records of the counted problems; waits for the results.

        Raises:
            NonFiniteError: a result or gradient is not finite.
            ValueError: a score or weight is not.
        """
        records = self.outcome.records if self.outcome is not None else []
        found = self.gradients.found() if self.gradients is not None else None
        if found is not None:
            problems = self.outcome.problems if self.outcome is not None else []
            raise NonFiniteError(f"{named(problems)}: {found}")
        return [r for r, item in zip(records, self.items, strict=False) if item.counted]


@dataclass
class OpenStep:
    """The current optimizer step on this rank.

    Attributes:
        micros: the micro-batches so far.
        not_finite: a message about the first loss that was not finite on this rank, or None.
        loss: the sum of the losses of the micro-batches so far, a scalar; None before the first.
        logged: the loss of the last step that had one, a scalar; None before the first.
    """

    micros: list[Micro] = field(default_factory=list)
    not_finite: str | None = None
    loss: Tensor | None = None
    logged: Tensor | None = None

    def meet_not_finite(self, what: str, *, alone: bool) -> None:
        """Notes a loss that is not finite.

        With several processes the other ranks wait for this one, so the step continues. At its end
        `close` tells all ranks.

        Args:
            what: the message.
            alone: whether this is the only process.

        Raises:
            NonFiniteError: this is the only process.
        """
        if alone:
            raise NonFiniteError(what)
        self.not_finite = self.not_finite or what

    def outputs(self, *, alone: bool) -> list[ProblemRecord]:
        """Takes out the last micro-batch; returns the records of all its problems and waits for it.

        Raises:
            NonFiniteError: a result is not finite, and this is the only process.
            ValueError: a score or weight is not finite.
        """
        outcome = self.micros.pop().outcome
        try:
            return outcome.records if outcome is not None else []
        except NonFiniteError as error:
            self.meet_not_finite(str(error), alone=alone)
            return []

    def close(self, gradients: GradientCheck | None, *, alone: bool) -> ClosedStep:
        """Reads the results, gathers those of all ranks and starts a new step.

        The summed loss is kept.

        Args:
            gradients: the check of the gradients of the whole step; None if the micro-batches have
                their own.
            alone: whether this is the only process.

        Raises:
            NonFiniteError: a result or gradient is not finite, and this is the only process.
            ValueError: a score or weight is not finite; raised on every rank.
        """
        # The last check waits for all that the device has to do; then nothing else waits.
        found = [check.found() for check in (gradients, self.micros[-1].gradients) if check]
        read: list[list[ProblemRecord]] = []
        broken: str | None = None
        for micro in self.micros:
            try:
                read.append(micro.records())
            except NonFiniteError as error:
                self.meet_not_finite(str(error), alone=alone)
                read.append([])
            except ValueError as error:  # of a score: the other ranks must not wait for this one
                if alone:
                    raise
                broken = broken or str(error)
                read.append([])
        bad_gradient = found[0] if gradients is not None else None
        ranks: list[Any] = [(read, self.not_finite, bad_gradient, broken)]
        if not alone:
            ranks = gather_object(ranks)
        for *_, error_of_rank in ranks:
            if error_of_rank is not None:
                raise ValueError(error_of_rank)
        self.micros, self.not_finite = [], None
        # In data order: by micro-batch, then by rank.
        micros = zip(*(rank[0] for rank in ranks), strict=True)
        records = [r for micro in micros for of_rank in micro for r in of_rank]
        losses = [rank[1] for rank in ranks if rank[1] is not None]
        bad = [rank[2] for rank in ranks if rank[2] is not None]
        if losses:
            return ClosedStep(records, losses[0])
        if bad:
            names = ", ".join(repr(r.question_id) for r in records)
            return ClosedStep(records, f"one of question_ids {names}: {bad[0]}")
        return ClosedStep(records, None)

    def add_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch."""
        self.loss = loss if self.loss is None else self.loss + loss

    def correct_loss(self, factor: float | None) -> Tensor:
        """Returns what is to be added to the summed loss, so that the log is right; resets it.

        Args:
            factor: of the summed loss. None for a step that is left out: like transformers for a
                loss that is not finite, the log then repeats the step before (0 before the first).
        """
        loss, self.loss = self.loss, None
        assert loss is not None  # a step has a micro-batch
        if factor is not None:
            self.logged = loss * factor
        return -loss if self.logged is None else self.logged - loss


@dataclass(frozen=True)
class ClosedStep:
    """The results of all ranks in a step: records in data order, and a non-finite value if any."""

    records: list[ProblemRecord]
    not_finite: str | None


def copy_gradients(model: nn.Module) -> Gradients:
    """Returns a copy of every gradient, for `restore_gradients`."""
    return {
        p: None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad
    }


def restore_gradients(copies: Gradients) -> None:
    """Sets the gradients to copies from `copy_gradients`."""
    for parameter, gradient in copies.items():
        parameter.grad = gradient


def clear_gradients(model: nn.Module) -> None:
    """Removes the gradients, so that the optimizer changes no parameter."""
    for parameter in model.parameters():
        parameter.grad = None


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiplies every gradient by `factor`, in place."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    foreach_multiply([own_part(g) for g in gradients], factor)
