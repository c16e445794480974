"""The loss of a micro-batch: build tensors, run the student, weight, add the loss terms.

The loss of a rationale is its weight times the mean over its tokens of token weight times nll
(`compact.weighting.token_weights`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from compact.config import CompactConfig
from compact.passes import Batch, EncodedProblem, Pass
from compact.passes.forward import check_ids, run_pass
from compact.passes.packing import Layout, build_batch
from compact.passes.segments import segment_mean, segment_sum
from compact.passes.transfer import put
from compact.strategies import LossTerm, Strategy
from compact.student import Student
from compact.trainer.batches import Collate, Item, MicroBatch, asks_leaves
from compact.trainer.outcome import Outcome
from compact.trainer.records import not_finite_in, with_kept_levels
from compact.trainer.sharding import asked_for
from compact.trainer.step import OpenStep
from compact.weighting import Weigher, Weights, weigh_tokens
from compact_ops.linear_token_stats import plan_head_grad

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A micro-batch as the argument of the model's forward; DDP and FSDP do not look inside."""

    items: Sequence[Item]


@dataclass
class MicroBatchLoss:
    """Computes the loss of a micro-batch: the sum over its counted problems.

    Attributes:
        student, weigher, strategy, layout, args, accelerator: those of the trainer.
        terms: the terms that are added to the weighted negative log-likelihoods.
        kept_levels: question_id -> the levels of its last visit, leaves in order and the bare
            question's last. Used if leaf_every > 1.
    """

    student: Student
    weigher: Weigher
    strategy: Strategy
    layout: Layout
    args: CompactConfig
    accelerator: Accelerator
    terms: list[LossTerm] = field(init=False)
    kept_levels: dict[str, list[float]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)  # unknown teachers that the log has named

    def __post_init__(self) -> None:
        own = self.weigher.consistency
        self.terms = [*([own] if own is not None else []), *self.strategy.loss_terms()]

    def __call__(
        self, items: Sequence[Item], step: OpenStep, number: int
    ) -> tuple[Tensor, Outcome | None]:
        """Computes loss and results. Replaces the model's forward inside DDP, FSDP or DeepSpeed.

        Args:
            items: the problems of the micro-batch.
            step: the current optimizer step.
            number: the number of optimizer steps before it.

        Returns:
            The loss (scalar), and the results, which tell what is not finite when they are read.
            No results if steps are skipped, a token statistic or a level is not finite, and there
            are several processes: the error is raised at the end of the step.

        Raises:
            NonFiniteError: a token statistic or a level is not finite, and there is only one
                process.
        """
        training = self.student.model.training
        alone = self.accelerator.num_processes == 1
        own = [item.problem for item in items]
        problems: Sequence[EncodedProblem] = own
        if training:
            with self.accelerator.autocast():
                problems = self.strategy.rollout(problems, self.student)
            if len(problems) != len(own):
                raise ValueError(
                    f"rollout of {type(self.strategy).__name__} must return {len(own)} problems, "
                    f"one for each that it is given, got {len(problems)}"
                )
        needs_leaves = self.weigher.needs.leaves
        due = not training or number % self.args.leaf_every == 0
        kept = [self._kept(p) if needs_leaves and not due else None for p in problems]
        built = items.batch if isinstance(items, MicroBatch) else None
        if built is None:
            built = self.build(problems, leaves=needs_leaves and self._leaves_due(problems, kept))
        check_ids(self.student, problems, leaves=needs_leaves)
        batch = built.to(self.args.device)
        known = self._known(batch, items) if training else None
        with self.accelerator.autocast():
            live, hidden, pass_ = run_pass(
                self.student,
                batch,
                head_grad=self.args.head_grad,
                filter_eps=self.args.filter_eps,
                statistics=self.weigher.needs.statistics,
                token_weight=None if known is None else _of_tokens(known.used, batch),
            )
            if needs_leaves:
                pass_ = with_kept_levels(pass_, kept)
            # A run that goes on must not weigh by what is not finite: weighers and strategies
            # keep sums. One that stops finds it when the results are read.
            found = self._not_finite(pass_) if self.args.on_nonfinite == "skip" else None
            try:
                if found is None:
                    with torch.no_grad():
                        weights = known or _of_counted(items, self.weigher.weights(pass_), batch)
                        if training:
                            weights = weights._replace(weight=self.strategy.weigh(pass_, weights))
                        else:
                            weights = self._of_known_teachers(weights, batch)
            except Exception:
                found = self._not_finite(pass_)
                if found is None:
                    raise
            if found is not None:
                step.meet_not_finite(found, alone=alone)
                nll = live.nll if live.weight is None else live.nll * live.weight
                return nll.sum(), None
            weight = weights.used.detach()
            of_tokens = weigh_tokens(self.args.token_weights, pass_.stats)
            own_loss = segment_mean(of_tokens * live.nll, batch.token_offsets)
            loss = self.strategy.nll_factor * (weight * own_loss).sum()
            for term in self.terms:
                loss = loss + term(hidden, pass_, weight)
        return loss, Outcome(
            pass_,
            weights,
            segment_mean(pass_.stats.nll, batch.token_offsets),  # without token weights
            of_tokens,
            loss,
            weigher=self.weigher,
            token_weights=self.args.token_weights,
            terms=[term.name for term in self.terms],
            with_levels=needs_leaves,
        )

    @torch.no_grad()
    def _known(self, batch: Batch, items: Sequence[Item]) -> Weights | None:
        """The weights of a batch, if they can be known, and used, before the student runs.

        With them, one sweep computes the token statistics and the gradient of a trained head: no
        logits are kept or computed again. A GPU is faster with few large products, so there this is
        done only if logits would be computed again otherwise.
        """
        head, bias = self.student.weight, self.student.bias
        plan = plan_head_grad(
            self.args.head_grad,
            len(batch.target),
            *head.shape[::-1],
            train_hidden=True,
            train_head=head.requires_grad or (bias is not None and bias.requires_grad),
        )
        of_use = ("recompute",) if head.is_cuda else ("recompute", "stash")
        fixed = (
            not self.weigher.needs.student
            and self.args.token_weights == "none"
            and type(self.strategy).weigh is Strategy.weigh
        )
        if not (fixed and self.args.head_grad == "auto" and plan.mode in of_use):
            return None
        return _of_counted(items, self.weigher.weights(Pass.before(batch, self.student)), batch)

    def _of_known_teachers(self, weights: Weights, batch: Batch) -> Weights:
        """Returns the weights of an evaluation without the teachers that the strategy cannot read.

        The other rationales of a problem get its whole weight. A problem without any has weight 0.
        """
        teachers = batch.teachers
        unknown = {name for name in teachers if not self.strategy.knows(name)}
        if not unknown:
            return weights
        if unknown - self._told:
            logger.warning(
                "evaluation: the loss leaves out the rationales of %s, because strategy %s has no "
                "model of these teachers",
                ", ".join(sorted(unknown)),
                self.args.strategy,
            )
            self._told |= unknown
        weight, offsets = weights.weight, batch.problem_offsets
        kept = weight * put([name not in unknown for name in teachers], weight, torch.bool)
        whole, rest = (segment_sum(each, offsets)[batch.problem] for each in (weight, kept))
        return weights._replace(weight=torch.where(rest > 0, kept / rest * whole, 0.0))

    @property
    def build(self) -> Callable[..., Batch]:
        """Builds the tensors of problems, given `leaves`; it can be pickled."""
        return partial(
            build_batch,
            layout=self.layout,
            options=self.weigher.needs.options,
            pad_token_id=self.student.pad_token_id,
            row_capacity=self.args.max_length,
            row_limit=self.args.max_row_length,
        )

    def collate(self, *, training: bool) -> Collate:
        """Returns what makes micro-batches, with their tensors if no step has a say in them."""
        leaves = self.weigher.needs.leaves
        own = training and type(self.strategy).rollout is not Strategy.rollout
        kept = training and leaves and self.args.leaf_every > 1
        asks_others = leaves and asked_for(self.args) is not None
        return Collate(None if own or kept or asks_others else self.build, leaves)

    def _not_finite(self, pass_: Pass) -> str | None:
        return not_finite_in(pass_.batch, pass_.stats.nll, pass_.leaf_logp, pass_.option_logp)

    def _kept(self, problem: EncodedProblem) -> list[float] | None:
        """The leaf likelihoods of the problem's last visit; None where they are of other leaves."""
        levels = self.kept_levels.get(problem.question_id)
        asked = sum(len(r.asked_steps) for r in problem.rationales) + 1 if problem.gold_ids else 0
        return levels if levels is not None and len(levels) == asked else None

    def _leaves_due(
        self, problems: Sequence[EncodedProblem], kept: Sequence[list[float] | None]
    ) -> bool:
        """Whether the micro-batch runs answer leaves.

        It does if some problem has a gold answer to ask for and no kept levels.

        If parameters are sharded, every run of the body gathers them from all ranks. So all ranks
        run leaves if one rank has to.
        """
        due = asks_leaves(p for p, k in zip(problems, kept, strict=True) if k is None)
        if asked_for(self.args) is not None:
            due = any(gather_object([due]))
        return due


def _of_counted(items: Sequence[Item], weights: Weights, batch: Batch) -> Weights:
    """Returns weights in which the problems that are not counted are not usable."""
    if all(item.counted for item in items):
        return weights
    usable = put([item.counted for item in items], weights.weight, torch.bool)[batch.problem]
    if weights.usable is not None:
        usable = usable & weights.usable
    return weights._replace(usable=usable)


def _of_tokens(weight: Tensor, batch: Batch) -> Tensor:
    """Returns [M] the factor of each token's nll in the loss, up to one that all tokens share."""
    # In float64, so that it is as exact as the gradient of a float64 student.
    return (weight.double() / batch.token_offsets.diff())[batch.rationale]


@contextmanager
def routed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, `forward` replaces that of the module; hooks and wrappers still run."""
    own = module.__dict__.get("forward")  # accelerate sets one for mixed precision
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
