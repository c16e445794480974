"""An optimizer step over its micro-batches: records, non-finite values, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from compact.passes import EncodedProblem, Pass
from compact.strategies import Strategy
from compact.student.internals import foreach_multiply, foreach_norm
from compact.trainer.records import NonFiniteError, ProblemRecord


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
class OpenStep:
    """The current optimizer step on this rank.

    Attributes:
        micros: records of the counted problems of each micro-batch so far.
        not_finite: a message about the first loss that was not finite on this rank, or None.
        loss: the sum of the losses of the micro-batches so far, a scalar.
    """

    micros: list[list[ProblemRecord]] = field(default_factory=list)
    not_finite: str | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))

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

    def close(self, bad_gradient: str | None, *, alone: bool) -> ClosedStep:
        """Gathers the results of all ranks and starts a new step. The summed loss is kept."""
        ranks: list[Any] = [(self.micros, self.not_finite, bad_gradient)]
        if not alone:
            ranks = gather_object(ranks)
        self.micros, self.not_finite = [], None
        # In data order: by micro-batch, then by rank.
        micros = zip(*(rank[0] for rank in ranks), strict=True)
        records = [r for micro in micros for of_rank in micro for r in of_rank]
        losses = [rank[1] for rank in ranks if rank[1] is not None]
        gradients = [rank[2] for rank in ranks if rank[2] is not None]
        if losses:
            return ClosedStep(records, losses[0])
        if gradients:
            names = ", ".join(repr(r.question_id) for r in records)
            return ClosedStep(records, f"one of question_ids {names}: {gradients[0]}")
        return ClosedStep(records, None)

    def take_loss(self) -> Tensor:
        """Returns the summed loss and resets it to 0."""
        loss, self.loss = self.loss, torch.zeros(())
        return loss


@dataclass(frozen=True)
class ClosedStep:
    """The results of all ranks in a step: records in data order, and a non-finite value if any."""

    records: list[ProblemRecord]
    not_finite: str | None


def bad_gradient(model: nn.Module) -> str | None:
    """Returns a message about a gradient of this rank that is not finite; None if all are."""
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    if not named:
        return None
    norms = foreach_norm([_own_part(gradient) for _, gradient in named])
    finite = torch.isfinite(torch.stack([norm.float() for norm in norms]))
    if bool(finite.all()):
        return None
    return f"the gradient of {named[int((~finite).nonzero()[0])][0]} is not finite"


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
    foreach_multiply([_own_part(g) for g in gradients], factor)


def _own_part(tensor: Tensor) -> Tensor:
    """Returns the part of a sharded tensor that this rank holds; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named(problems: Sequence[EncodedProblem]) -> str:
    """Returns the text by which an error names the problems of a micro-batch."""
    names = ", ".join(repr(p.question_id) for p in problems)
    return f"question_id {names}" if len(problems) == 1 else f"one of question_ids {names}"


def not_finite_in(pass_: Pass) -> str | None:
    """Returns a message about the first statistic that is not finite; None if all are."""
    batch = pass_.batch
    bad = ~torch.isfinite(pass_.stats.nll)
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        rationale = int(batch.rationale[token])
        problem = batch.problems[int(batch.problem[rationale])]
        place = token - int(batch.token_offsets[rationale])
        return (
            f"question_id {problem.question_id!r}, teacher {batch.teachers[rationale]!r}: the loss "
            f"of completion token {place} is {float(pass_.stats.nll[token])}"
        )
    if not bool(torch.isfinite(pass_.leaf_logp).all()):
        return f"{named(batch.problems)}: the log-likelihood of the gold answer is not finite"
    if pass_.option_logp is not None and not bool(torch.isfinite(pass_.option_logp).all()):
        return f"{named(batch.problems)}: the log-likelihood of an option is not finite"
    return None
