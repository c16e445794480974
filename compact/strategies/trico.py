"""TRiCo: a small gold set tunes beta and tau of the weights during training.

The weights are alpha = softmax(u / tau), u = sum_s beta_s z_s over the scores of the preset. One
step of gradient descent on sum_k alpha_k L_k with rate eta changes the loss on the gold set by
- eta sum_k alpha_k <G_val, G_k> to first order. So beta and log tau go down the gradient of

    J = - sum_k alpha_k cos(G_val, G_k),

with d alpha_k / d beta_s = alpha_k (z_sk - sum_l alpha_l z_sl) / tau.

Source: TRiCo (arXiv 2509.21526), whose teacher tunes the thresholds of pseudo-labels by a one-step
unrolled validation loss; its vision views are out of scope. Ours: beta and tau in place of the
thresholds; G are the head gradients of `weighting/gradients.py`; cosines, so the rate has no unit.
The gold set is taken from the training problems, which then do not train: the right rationales of
`gold` problems give G_val, which is computed anew every `every` steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compact.metrics import COMPATIBILITY, VALIDITY
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.settings import MAX_LENGTH
from compact.strategies.base import Strategy, register_strategy, sum_over_ranks
from compact.student import evaluating
from compact.weighting.gradients import head_gradients
from compact.weighting.weighers import PresetWeigher

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.student import Student
    from compact.weighting import Weigher, Weights


@register_strategy("trico")
class Trico(Strategy):
    """A small gold set tunes the factors beta and the temperature of a preset's scores."""

    needs = ("gold",)
    needs_whole_model: ClassVar[bool] = True

    def __init__(
        self,
        gold: int = 16,
        rate: float = 0.1,
        every: int = 10,
        beta: Sequence[float] = (1.0, 1.0, 0.5),
        tau: float = 1.0,
    ) -> None:
        """Sets up the gold set.

        Args:
            gold: problems of the gold set.
            rate: step of beta and log tau.
            every: optimizer steps between two computations of G_val.
            beta: first factors of adaptability, consensus and difficulty; the last is subtracted.
            tau: first temperature.

        Raises:
            ValueError: a value is not allowed.
        """
        check_number("gold of trico", gold, least=1, whole=True)
        check_number("every of trico", every, least=1, whole=True)
        check_number("rate of trico", rate, least=0)
        check_number("tau of trico", tau, above=0)
        if not isinstance(beta, Sequence) or len(beta) != len(COMPATIBILITY):
            raise ValueError(f"beta of trico must be three numbers, got {beta!r}")
        for factor in beta:
            check_number("beta of trico: each factor", factor)
        self.gold, self.rate, self.every = gold, rate, every
        signs = (1.0, 1.0, -1.0)
        self.beta = {
            str(a): s * float(b) for a, s, b in zip(COMPATIBILITY, signs, beta, strict=True)
        }
        self.log_tau = math.log(tau)
        self.max_length, self.steps = MAX_LENGTH, 0
        self._encoded: list[EncodedProblem] = []
        self._target: Tensor | None = None  # G_val / |G_val|
        self._slopes = dict.fromkeys([*self.beta, "tau"], 0.0)
        self._count = 0.0

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses policies, which have no scores to weigh, and settings that it does not read."""
        if not isinstance(weigher, PresetWeigher):
            raise ValueError(
                "preset must be one with scores with strategy trico, which tunes their factors, "
                f"got the policy {args.preset!r}"
            )
        if not weigher.metrics:
            raise ValueError(
                f"overrides must leave one of {', '.join(COMPATIBILITY)} with strategy trico, "
                "which tunes their factors, got none for all"
            )
        for name in ("floor", "warmup"):
            if value := getattr(weigher.preset, name):
                raise ValueError(
                    f"{name} of the preset must be 0 with strategy trico, whose weights have "
                    f"none, got {value!r}"
                )
        for name in ("beta", "tau"):
            if name in (args.overrides or ()):
                raise ValueError(
                    f"overrides must not have {name} with strategy trico, which starts from its "
                    f"own; set strategy_options {{{name}: ...}}"
                )
        self.max_length = args.max_length

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Takes the gold set out of the problems: the last ones with a right rationale."""
        found: dict[int, EncodedProblem] = {}
        for i in reversed(range(len(problems))):  # large data are not encoded as a whole here
            encoded = encode_problem(problems[i], processing_class, max_length=self.max_length)
            if any(encoded.right):
                found[i] = encoded
            if len(found) == self.gold:
                break
        if not found or len(found) == len(problems):
            raise ValueError(
                f"trico needs problems with a right rationale besides those to train on, found "
                f"{len(found)} among {len(problems)}, with gold {self.gold}"
            )
        self._encoded = [found[i] for i in sorted(found)]
        return [p for i, p in enumerate(problems) if i not in found]

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Computes G_val where it is due; the problems stay."""
        if self._target is None or (self.steps % self.every == 0 and not self._count):
            total: Tensor | None = None
            with evaluating(student.model):
                for problem in self._encoded:
                    pass_ = observe(student, [problem], layout="padded", leaves=False)
                    (gradients,) = head_gradients(pass_)
                    own = gradients[list(problem.right)].mean(0)
                    total = own if total is None else total + own
            assert total is not None  # prepare found a gold set
            self._target = total / total.norm().clamp(min=1e-30)
        return problems

    def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
        """Returns softmax(u / tau), and adds to the slopes of J."""
        assert self._target is not None  # rollout runs first
        target = self._target.to(pass_.hidden.device)
        sizes, tau = pass_.batch.counts, math.exp(self.log_tau)
        axes = [axis for axis in self.beta if axis in weights.zscores]
        z = torch.stack([weights.zscores[axis].float() for axis in axes])  # [axes, R]
        beta = z.new_tensor([self.beta[axis] for axis in axes])
        found = []
        validity = weights.scores.get(VALIDITY, torch.ones(z.shape[1]))
        # Log of the validity, as in the weights of a preset. All 0 is handled by `Weights.usable`.
        priors = validity.to(z).clamp(min=1e-30).log().split(sizes)
        used = weights.used.split(sizes)
        parts = zip(z.split(sizes, dim=1), priors, head_gradients(pass_), used, strict=True)
        for own, prior, gradients, weight in parts:
            u = beta @ own
            alpha = (u / tau + prior).softmax(0)
            found.append(alpha)
            if not weight.any():  # it does not train, so it has no say in how to weigh
                continue
            cosine = gradients @ target / gradients.norm(dim=1).clamp(min=1e-30)
            centred = alpha * (cosine - alpha @ cosine)  # d(sum alpha cos) / d(u / tau)
            for axis, value in zip(axes, (own @ centred / tau).tolist(), strict=True):
                self._slopes[axis] -= value
            self._slopes["tau"] += float(u @ centred) / tau
            self._count += 1
        return torch.cat(found)

    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Moves beta and log tau down the mean slope of J over the problems of the step."""
        self.steps = step
        names = list(self._slopes)
        *slopes, count = sum_over_ranks([*self._slopes.values(), self._count], model)
        self._slopes, self._count = dict.fromkeys(names, 0.0), 0.0
        if not count:
            return
        for name, slope in zip(names, slopes, strict=True):
            move = self.rate * slope / count
            if name == "tau":
                self.log_tau -= move
            else:
                self.beta[name] -= move

    def take_log(self) -> dict[str, float]:
        """Returns beta and tau."""
        found = {f"beta/{axis}": value for axis, value in self.beta.items()}
        return found | {"tau": math.exp(self.log_tau)}

    def state_dict(self) -> dict[str, Any]:
        """Returns beta, tau and G_val."""
        own = {} if self._target is None else {"target": self._target}
        return {"steps": self.steps, "beta": self.beta, "log_tau": self.log_tau, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.steps, self.beta = int(state["steps"]), dict(state["beta"])
        self.log_tau, self._target = float(state["log_tau"]), state.get("target")
