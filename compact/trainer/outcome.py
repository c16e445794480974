"""The results of a micro-batch on their way to the host: read when its step closes.

On a GPU the host is ahead of the device. Reading a result of the forward at once would stop it
until the device has caught up. So all results go to the host in one asynchronous copy, behind which
the backward and the next micro-batch are queued; what is not finite is found when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compact.passes import EncodedProblem, Pass
from compact.passes.transfer import Arriving
from compact.student.internals import foreach_norm
from compact.trainer.records import (
    NonFiniteError,
    ProblemRecord,
    named,
    not_finite_in,
    own_part,
    records_of,
)
from compact.weighting import Weigher, Weights, check_token_weights


class Outcome:
    """The results of the forward of a micro-batch.

    Attributes:
        problems: its problems.
    """

    def __init__(
        self,
        pass_: Pass,
        weights: Weights,
        nll: Tensor,
        token_weight: Tensor,
        loss: Tensor,
        *,
        weigher: Weigher,
        token_weights: str,
        terms: Sequence[str],
        with_levels: bool,
    ) -> None:
        """Starts the copy to the host.

        Args:
            pass_: the pass of the micro-batch.
            weights: its weights.
            nll: [R] mean loss of the tokens of each rationale.
            token_weight: [M] weights of the tokens.
            loss: the loss, a scalar.
            weigher: what gave the weights.
            token_weights: the name of what gave the token weights.
            terms: names of the loss terms, for the error if `loss` is not finite.
            with_levels: whether the weigher reads answer leaves.
        """
        self.problems: tuple[EncodedProblem, ...] = pass_.batch.problems
        self._batch = pass_.batch.on_host
        self._weigher, self._token_weights, self._terms = weigher, token_weights, terms
        self._with_levels, self._axes = with_levels, (tuple(weights.scores), tuple(weights.zscores))
        results = {
            "token_nll": pass_.stats.nll,
            "leaf_logp": pass_.leaf_logp,
            "option_logp": pass_.option_logp,
            "token_weight": token_weight,
            "nll": nll,
            "loss": loss.detach(),
            "weight": weights.weight,
            "usable": weights.usable,
            **{f"score {axis}": score for axis, score in weights.scores.items()},
            **{f"zscore {axis}": z for axis, z in weights.zscores.items()},
        }
        self._arriving = Arriving({k: t.detach() for k, t in results.items() if t is not None})

    @cached_property
    def records(self) -> list[ProblemRecord]:
        """One record per problem; waits for the copy.

        Raises:
            NonFiniteError: a token statistic, a level or the loss is not finite.
            ValueError: a score or weight is not.
        """
        found = self._arriving.get()
        levels, options = found["leaf_logp"], found.get("option_logp")
        bad = not_finite_in(self._batch, found["token_nll"], levels, options)
        if bad is not None:
            raise NonFiniteError(bad)
        scores, zscores = (
            {axis: found[f"{kind} {axis}"] for axis in axes}
            for kind, axes in zip(("score", "zscore"), self._axes, strict=True)
        )
        weights = Weights(found["weight"], scores, zscores, found.get("usable"))
        self._weigher.check(weights, self._batch)
        check_token_weights(self._token_weights, found["token_weight"], found["token_nll"])
        if not bool(torch.isfinite(found["loss"])):
            terms = " or ".join(self._terms)
            what = f"the {terms} term is {float(found['loss'])}"
            raise NonFiniteError(f"{named(self.problems)}: {what}")
        return records_of(self._batch, weights, found["nll"], levels if self._with_levels else None)


class GradientCheck:
    """Whether the gradients of this rank are finite, on the way to the host."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        """Starts the check.

        Args:
            model: the student, to name a parameter.
            optimizer: holds the parameters. A walk over the modules of a peft model takes longer
                than the check.
        """
        groups = optimizer.param_groups
        self._model = model
        held = [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None]
        self._checked = [p for p, _ in held]
        self._arriving: Arriving | None = None
        if held:
            norms = foreach_norm([own_part(gradient) for _, gradient in held])
            finite = torch.isfinite(torch.stack([norm.float() for norm in norms]))
            self._arriving = Arriving({"finite": finite})

    def found(self) -> str | None:
        """Returns a message about a gradient that is not finite; None if all are. Waits."""
        if self._arriving is None:
            return None
        finite = self._arriving.get()["finite"]
        if bool(finite.all()):
            return None
        bad = self._checked[int((~finite).nonzero()[0])]
        names = [name for name, p in self._model.named_parameters() if p is bad]
        return f"the gradient of {', '.join(names) or 'a parameter'} is not finite"
