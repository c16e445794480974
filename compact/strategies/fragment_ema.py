"""Fragment EMA: a self-teacher that follows a random fifth of the student at each step.

After each step, every parameter tensor is drawn with probability `share` (.2); a drawn tensor moves

    e <- m e + (1 - m) theta,   m = 1 - (1 - m_0) (cos(pi step / steps) + 1) / 2.

The self-teacher's logits join as one more teacher: the term is `factor` times the forward KL from
it to the student over the tokens of the rationales, weighted like them. The average e is kept in
float32 at least: in bfloat16 a move of less than 1 / 256 of a number would be lost.

Source: ATSEN (arXiv 2212.06522): fragment updates, cosine momentum; its gradient weights are the
policies `mgda` and `pcgrad`. Ours: the self-teacher reads the teachers' rationales instead of
writing its own. It costs one more forward of the body and one copy of the trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compact.means import Means
from compact.options import check_number
from compact.passes import Pass
from compact.passes.forward import token_states
from compact.passes.segments import segment_mean
from compact.strategies.base import LossTerm, Strategy, Term, register_strategy
from compact.strategies.white_box import completion_states
from compact.student import autocast_dtype, evaluating
from compact_ops import head_divergence

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.weighting import Weigher


@register_strategy("fragment-ema")
class FragmentEma(Strategy):
    """A self-teacher that averages a random fifth of the parameters at each step joins (ATSEN)."""

    needs_whole_model: ClassVar[bool] = True

    def __init__(self, share: float = 0.2, momentum: float = 0.9, factor: float = 1.0) -> None:
        """Sets up the average.

        Args:
            share: probability that a tensor moves in a step.
            momentum: m_0, of the first step; it grows to 1 at the last.
            factor: factor of the term.

        Raises:
            ValueError: a value is not allowed.
        """
        check_number("share of fragment-ema", share, above=0, most=1)
        check_number("momentum of fragment-ema", momentum, least=0, below=1)
        check_number("factor of fragment-ema", factor, least=0)
        self.share, self.momentum, self.factor = share, momentum, factor
        self.seed, self.total = 0, 0
        self.average: dict[str, Tensor] = {}
        self._means = Means()

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps the seed."""
        self.seed = args.seed

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Starts the average at the student, unless a checkpoint gave it."""
        self.total = total_steps
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = self.average or {n: p.detach().clone() for n, p in trained.items()}
        dtypes = {n: torch.promote_types(p.dtype, torch.float32) for n, p in trained.items()}
        self.average = {n: t.to(trained[n].device, dtypes[n]) for n, t in found.items()}

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Moves the fragments of this step."""
        m = momentum_at(self.momentum, step, self.total)
        moved = 0
        for name, parameter in model.named_parameters():
            if name in self.average and Random(f"{self.seed}/{step}/{name}").random() < self.share:
                self.average[name].lerp_(parameter.to(self.average[name].dtype), 1.0 - m)
                moved += 1
        self._means.add("fragments moved", moved / max(len(self.average), 1))
        self._means.add("momentum", m)

    def term(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns factor x sum_k alpha_k mean KL(self-teacher || student)."""
        if not self.average or not self.factor:  # an evaluation before training
            return hidden.new_zeros((), dtype=torch.float32)
        student, batch = pass_.student, pass_.batch
        with self._averaged(student.model), _uncached(hidden.device.type), torch.no_grad():
            states = token_states(student, batch)
            head = student.weight.detach()
            bias = None if student.bias is None else student.bias.detach()
        found = head_divergence(
            completion_states(hidden, pass_),
            student.weight,
            states,
            head,
            bias=student.bias,
            softcap=student.softcap,
            logit_scale=student.logit_scale,
            teacher_bias=bias,
            teacher_softcap=student.softcap,
            teacher_logit_scale=student.logit_scale,
        )
        part = (weight * segment_mean(found, batch.token_offsets)).sum()
        if hidden.requires_grad:  # training
            self._means.add("kl to the self-teacher", float(part.detach()), len(batch.problems))
        return self.factor * part

    @contextmanager
    def _averaged(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights and is in eval mode.

        The storage is exchanged, not overwritten: the graph of the student's forward stays valid.
        """
        own = {n: p.data for n, p in model.named_parameters() if n in self.average}
        try:
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.data = self.average[name].to(parameter.dtype)
            with evaluating(model):
                yield
        finally:
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.data = own[name]

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the term."""
        return [Term("fragment-ema", self.term)]

    def take_log(self) -> dict[str, float]:
        """Returns the share of fragments that moved, the momentum and the divergence."""
        return self._means.take()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averaged weights."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.average = dict(state)


def _uncached(device: str) -> torch.autocast:
    """Returns a context with the same autocast as outside, but without its cache of casts.

    The cache finds the cast of a parameter by the parameter, not by its data. So other data in the
    same parameters would be read as those of the student, and the other way round.
    """
    dtype = autocast_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)


def momentum_at(first: float, step: int, total: int) -> float:
    """Returns m = 1 - (1 - first) (cos(pi step / total) + 1) / 2."""
    done = min(step / max(total, 1), 1.0)
    return 1.0 - (1.0 - first) * (math.cos(math.pi * done) + 1.0) / 2.0
