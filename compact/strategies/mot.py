"""MoT, mixture of thoughts: one branch per teacher, then the mean of the branches' weights.

A run is R rounds. In a round every teacher k trains a branch from the same weights theta, E steps
of plain SFT on its own rationales only, which gives theta_k. Then

    theta <- sum_k w_k theta_k,   w_k = 1 / K.

Source: Merge-of-Thought distillation (arXiv 2509.08814), with R = 5, E = 50, K = 4.

LoRA: the update of a layer is a product s B_k A_k, and the mean of products is not the product of
the means. So sum_k w_k B_k A_k is formed as one product of rank K r and truncated to rank r by the
SVD, without the dense matrix: QR of both stacks of factors, SVD of the small K r x K r product.
`truncated` in the log is the share of the squared norm that is lost.

Ours: the branches of a round train on the same problems in the same order, so identical teachers
give plain SFT. The K branches take K times the steps: E = steps / (R K), to compare at equal total
steps. Step i of the R E steps of a plain run has the learning rate of step K i of the schedule, in
every branch. `merge: weights` weighs a branch by the mean weight that the preset gave to its
teacher during the branch, over the problems that train. The optimizer starts anew in each branch.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from compact.means import Means
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.segments import segment_sum
from compact.strategies.base import Strategy, register_strategy, sum_over_ranks

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.student import Student
    from compact.weighting import Weigher, Weights

logger = logging.getLogger(__name__)

_A, _B = ".lora_A.", ".lora_B."


@register_strategy("mot")
class MergeOfThoughts(Strategy):
    """Rounds of one branch per teacher from the same weights; the branches' mean goes on."""

    needs = ("K x compute",)
    needs_whole_model: ClassVar[bool] = True

    def __init__(self, rounds: int = 5, merge: str = "mean") -> None:
        """Sets up the rounds.

        Args:
            rounds: R; the steps of the run are divided among the R x K branches.
            merge: "mean" for equal weights; "weights" for the mean weights of the preset, which
                takes a forward over all K rationales in every branch.

        Raises:
            ValueError: a value is not allowed.
        """
        check_number("rounds of mot", rounds, least=1, whole=True)
        if merge not in ("mean", "weights"):
            raise ValueError(f"merge of mot must be mean or weights, got {merge!r}")
        self.rounds, self.merge = rounds, merge
        self.teachers: list[str] = []
        self.branch = 0  # of the whole run: round x K + teacher
        self._total = self._skipped = 0  # steps: of the run; that the loss scaler of fp16 skipped
        self._ends: list[int] = []
        self._start: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}  # dense parameters: sum of w_k theta_k
        self._factors: dict[str, Tensor] = {}  # LoRA: the branches' w_k B_k and A_k, stacked
        self._mass = 0.0  # sum of w_k of the finished branches of the round
        self._own = [0.0, 0.0]  # sum and count of the teacher's weights in this step on this rank
        self._seen = [0.0, 0.0]  # the same of all ranks, in this branch
        self._means = Means()
        self._args: CompactConfig | None = None
        self._schedule: Callable[[int], float] | None = None  # step -> factor of the rate

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses one teacher, a preset with nothing to weigh, and to end before the last merge."""
        if weigher.teacher is not None:
            raise ValueError(
                f"preset must not be {args.preset} with strategy mot, which trains a branch for "
                "each of several teachers"
            )
        if self.merge == "mean" and args.preset != "uniform":
            raise ValueError(
                f"preset must be uniform with strategy mot, got {args.preset!r}: a branch has one "
                "teacher, so there is nothing to weigh; to weigh the branches by the preset, set "
                "strategy_options {merge: weights}"
            )
        for name, refused in (("load_best_model_at_end", True), ("save_strategy", "best")):
            if getattr(args, name) == refused:
                raise ValueError(
                    f"{name} must not be {refused} with strategy mot, because between two merges "
                    "the student is the branch of one teacher"
                )
        self._args = args

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Notes the teachers, in order of appearance."""
        self.teachers = list(dict.fromkeys(r.teacher for p in problems for r in p.rationales))
        return problems

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Divides the steps among the branches; the first round starts from these weights."""
        if self._total and self._total != total_steps:
            raise ValueError(
                f"max_steps must be {self._total} to resume a run of mot, which divided these "
                f"steps among its branches, got {total_steps}"
            )
        branches = self.rounds * len(self.teachers)
        if total_steps < branches:
            raise ValueError(
                f"max_steps must be at least {branches} for {self.rounds} rounds of "
                f"{len(self.teachers)} branches, got {total_steps}"
            )
        self._total = total_steps
        self._ends = _ends(total_steps, branches)
        self._schedule = None if self._args is None else _factors(self._args, total_steps)
        if not self._start:
            _refuse_adapters(model)
            self._start = _copy(model)
        device = next(model.parameters()).device  # a checkpoint is read on the CPU
        for tensors in (self._start, self._sum, self._factors):
            tensors |= {name: tensor.to(device) for name, tensor in tensors.items()}

    def data_step(self, step: int) -> int:
        """Every branch of a round trains on the problems of the same steps."""
        branch = bisect_right(self._ends, step)
        first = self._ends[branch - 1] if branch else 0
        return branch // len(self.teachers) * self._longest + step - first

    @property
    def _longest(self) -> int:
        """Steps of the longest branch."""
        return -(-self._total // len(self._ends))

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Keeps the rationale of the branch's teacher, if the preset need not see the others."""
        if self.merge == "weights":
            return problems
        return [self._narrowed(problem) for problem in problems]

    def _narrowed(self, problem: EncodedProblem) -> EncodedProblem:
        mine = tuple(r for r in problem.rationales if r.teacher == self.teacher)
        return replace(problem, rationales=mine) if mine else problem

    @property
    def teacher(self) -> str:
        """The teacher of the current branch."""
        return self.teachers[self.branch % len(self.teachers)]

    def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
        """Weight 1 for the branch's teacher; a problem without its rationale is left out."""
        batch, used = pass_.batch, weights.used
        found = torch.tensor([float(t == self.teacher) for t in batch.teachers], device=used.device)
        trains = segment_sum(used, batch.problem_offsets)[batch.problem] > 0
        self._own[0] += float((found * used).sum())
        self._own[1] += float((found * trains).sum())
        return found

    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Ends a branch after its last step, and a round after its last branch."""
        self._set_rate(step, optimizer)
        if self.merge == "weights":  # in each step: a checkpoint has the sums of all ranks
            found = sum_over_ranks(self._own, model)
            self._seen = [a + b for a, b in zip(self._seen, found, strict=True)]
        self._own = [0.0, 0.0]
        if step < self._ends[self.branch]:
            return
        share = 1.0
        if self.merge == "weights":
            total, count = self._seen
            share = total / count if count else 0.0
        self._seen = [0.0, 0.0]
        self._means.add(f"branch weight/{self.teacher}", share)
        self._keep(model, share)
        self.branch += 1
        optimizer.state.clear()
        if self.branch % len(self.teachers):
            _write(model, self._start)
            return
        merged = self._merged()
        self._means.add("merges", float(self.branch // len(self.teachers)))
        _write(model, merged)
        self._start = _copy(model)
        self._sum, self._factors, self._mass = {}, {}, 0.0

    def _set_rate(self, step: int, optimizer: Any) -> None:
        """Sets the rate of the step after `step` steps; the schedule has set that of the run.

        After a step that the loss scaler of fp16 skipped, transformers leaves the schedule where it
        was.
        """
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self._skipped += skipped
        if self._schedule is None or step >= self._total:
            return
        place = self.data_step(step) * self._total // (self._longest * self.rounds)
        asked = self._schedule(step - self._skipped)
        rates = [(g["lr"], g.get("initial_lr", math.nan) * asked) for g in optimizer.param_groups]
        if not skipped and not all(math.isclose(*r, rel_tol=1e-6, abs_tol=1e-30) for r in rates):
            logger.warning(
                "mot: the learning rate is not that of lr_scheduler_type in the settings, so "
                "the branches of a round have different rates and the merge depends on the "
                "order of the teachers; set lr_scheduler_type to constant"
            )
            self._schedule = None
            return
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule(place)
        self._means.add("learning rate", optimizer.param_groups[0]["lr"])

    def _keep(self, model: nn.Module, share: float) -> None:
        """Adds the weights of the branch that has ended, times w_k."""
        self._mass += share
        for name, p in _trained(model).items():
            value = p.detach()
            if _A in name or _B in name:
                value = value.clone() if _A in name else value * share
                before = [self._factors[name]] if name in self._factors else []
                self._factors[name] = torch.cat([*before, value], dim=0 if _A in name else 1)
            elif name in self._sum:
                self._sum[name] += share * value.double()
            else:
                self._sum[name] = share * value.double()

    def _merged(self) -> dict[str, Tensor]:
        """Returns the merged weights of the round."""
        if self._mass == 0.0:
            raise ValueError("mot: every branch of the round has weight 0, so there is no mean")
        merged = {name: total / self._mass for name, total in self._sum.items()}
        for name in self._factors:
            if _A in name:
                other = name.replace(_A, _B)
                a, b = self._factors[name], self._factors[other] / self._mass
                merged[name], merged[other], lost = truncated(a, b, self._start[name].shape[0])
                self._means.add("truncated", lost)
        return merged

    def take_log(self) -> dict[str, float]:
        """Returns the branch, and what was merged."""
        return {"branch": float(self.branch), **self._means.take()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the round, its first weights and its finished branches."""
        kinds = {"start": self._start, "sum": self._sum, "factors": self._factors}
        return {
            "branch": self.branch,
            "total": self._total,
            "skipped": self._skipped,
            "mass": self._mass,
            "seen": self._seen,
            **{f"{kind} {name}": t for kind, found in kinds.items() for name, t in found.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.branch, self._total = int(state["branch"]), int(state["total"])
        self._skipped = int(state.get("skipped", 0))
        self._mass, self._seen = float(state["mass"]), list(state["seen"])
        for kind, found in (
            ("start", self._start),
            ("sum", self._sum),
            ("factors", self._factors),
        ):
            prefix = f"{kind} "
            found |= {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Returns the best product B' A' of a rank for b @ a, and the share of ||b a||^2 it loses.

    Args:
        a: [n, in] stacked factors A.
        b: [out, n] stacked factors B.
        rank: r, the rank of the result.

    Returns:
        A' [r, in] and B' [out, r], with the singular values divided equally between them, and
        1 - sum_{i <= r} s_i^2 / sum_i s_i^2.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    new_a, new_b = root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    if len(root) < rank:  # fewer rows than the rank: the rest is 0
        more = rank - len(root)
        new_a, new_b = (
            nn.functional.pad(new_a, (0, 0, 0, more)),
            nn.functional.pad(new_b, (0, more)),
        )
    total = float(s.square().sum())
    lost = float(s[rank:].square().sum()) / total if total else 0.0
    return new_a.to(a.dtype), new_b.to(b.dtype), lost


def _ends(total: int, parts: int) -> list[int]:
    """Returns the step at which each of `parts` parts ends; lengths differ by at most 1."""
    return [total * (i + 1) // parts for i in range(parts)]


def _factors(args: CompactConfig, total: int) -> Callable[[int], float]:
    """Returns the learning-rate schedule of the settings: step, counted from 0 -> factor.

    A schedule that follows the losses gives 1 at every step.
    """
    kwargs = args.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # transformers has read it
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    found = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=kwargs,
    )
    if not isinstance(found, LambdaLR):
        return lambda step: 1.0
    factor: Callable[[int], float] = found.lr_lambdas[0]
    return factor


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _trained(model).items()}


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Overwrites the trained parameters."""
    for name, p in _trained(model).items():
        p.copy_(values[name])


def _refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError for adapters whose update is not a product B A."""
    names = list(_trained(model))
    for word in ("lora_embedding_", "lora_magnitude_vector", "ia3_", "hada_", "lokr_"):
        found = next((n for n in names if word in n), None)
        if found is not None:
            raise ValueError(
                f"strategy mot averages plain LoRA or whole weights, found the parameter {found}"
            )
