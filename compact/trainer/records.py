"""The results of a problem in a step as plain numbers: for logs, weigher and later steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from compact.means import Means
from compact.metrics import AXES
from compact.passes import Batch, EncodedProblem, Pass
from compact.passes.packing import question_leaves
from compact.passes.transfer import put, send
from compact.trainer.batches import Item
from compact.weighting import Weights


class NonFiniteError(ValueError):
    """A loss or gradient is not finite; the message names the problem and the value."""


@dataclass(frozen=True)
class ProblemRecord:
    """The results of a problem in a step, for its K rationales.

    Attributes:
        question_id: the id of the problem.
        teachers: [K] the name of each teacher.
        tokens: [K] the number of tokens of each completion.
        weight: [K] weights.
        nll: [K] mean negative log-likelihood of each completion, in nats per token.
        scores, zscores: axis -> [K]; empty for policies without scores.
        levels: the level (nats per token) at each answer leaf, the bare question's last; empty
            without a gold answer; None if the weigher uses no leaves.
        unread: teacher, number of tokens and validity (None if not judged) of each rationale that
            was not read.
    """

    question_id: str
    teachers: list[str]
    tokens: list[int]
    weight: list[float]
    nll: list[float]
    scores: dict[str, list[float]]
    zscores: dict[str, list[float]]
    levels: list[float] | None
    unread: list[tuple[str, int, float | None]]

    @property
    def has_loss(self) -> bool:
        """False if the policy gave every rationale weight 0."""
        return any(weight > 0 for weight in self.weight)


def named(problems: Sequence[EncodedProblem]) -> str:
    """Returns the text by which an error names the problems of a micro-batch."""
    names = ", ".join(repr(p.question_id) for p in problems)
    return f"question_id {names}" if len(problems) == 1 else f"one of question_ids {names}"


def own_part(tensor: Tensor) -> Tensor:
    """Returns the part of a sharded tensor that this rank holds; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def not_finite_in(
    batch: Batch, nll: Tensor, leaf_logp: Tensor, option_logp: Tensor | None
) -> str | None:
    """Returns a message about the first result of a pass that is not finite; None if all are.

    Args:
        batch: the input of the pass.
        nll: [M] its loss of each token.
        leaf_logp: as in `Pass`.
        option_logp: as in `Pass`.
    """
    each = [t for t in (nll, leaf_logp, option_logp) if t is not None]
    if bool(torch.isfinite(torch.cat(each)).all()):
        return None
    bad, host = ~torch.isfinite(nll), batch.on_host
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        rationale = int(host.rationale[token])
        problem = batch.problems[int(host.problem[rationale])]
        place = token - int(host.token_offsets[rationale])
        return (
            f"question_id {problem.question_id!r}, teacher {batch.teachers[rationale]!r}: the loss "
            f"of completion token {place} is {float(nll[token])}"
        )
    what = "an option" if bool(torch.isfinite(leaf_logp).all()) else "the gold answer"
    return f"{named(batch.problems)}: the log-likelihood of {what} is not finite"


def records_of(
    batch: Batch, weights: Weights, nll: Tensor, levels: Tensor | None
) -> list[ProblemRecord]:
    """Returns the results of a pass as plain numbers, one record per problem.

    Args:
        batch: the input of the pass, on the CPU like the other arguments.
        weights: the weights of the rationales.
        nll: [R] mean loss of the tokens of each rationale.
        levels: `Pass.leaf_logp`, or None if the weigher reads no leaves.
    """
    ends = batch.problem_offsets.tolist()
    weight, losses = weights.used.tolist(), nll.tolist()
    tokens = batch.token_offsets.diff().tolist()
    scores = {axis: s.tolist() for axis, s in weights.scores.items()}
    zscores = {axis: z.tolist() for axis, z in weights.zscores.items()}
    records = []
    for p, problem in enumerate(batch.problems):
        mine = slice(ends[p], ends[p + 1])
        records.append(
            ProblemRecord(
                question_id=problem.question_id,
                teachers=[r.teacher for r in problem.rationales],
                tokens=tokens[mine],
                weight=weight[mine],
                nll=losses[mine],
                scores={axis: s[mine] for axis, s in scores.items()},
                zscores={axis: z[mine] for axis, z in zscores.items()},
                levels=None if levels is None else levels[_leaves_of(batch, p)].tolist(),
                unread=[
                    (r.teacher, len(r.ids), None if r.judgement is None else r.judgement.validity)
                    for r in problem.unread
                ],
            )
        )
    return records


def scores_of(records: Sequence[ProblemRecord]) -> tuple[dict[str, Tensor], Tensor]:
    """Returns scores, axis -> [R] of all rationales, and offsets [P + 1] of the problems."""
    offsets = torch.tensor([0, *(len(r.weight) for r in records)]).cumsum(0)
    scores = {
        axis: torch.tensor([s for r in records for s in r.scores[axis]])
        for axis in records[0].scores
    }
    return scores, offsets


def score_rows(records: Sequence[ProblemRecord], step: int, epoch: float) -> list[dict[str, Any]]:
    """Returns rows of the score log (`runlog.SCHEMA`), one per rationale."""
    rows = []
    for record in records:
        axes = {**record.scores, **{f"z_{a}": z for a, z in record.zscores.items()}}
        common = {"step": step, "epoch": epoch, "question_id": record.question_id}
        for k, teacher in enumerate(record.teachers):
            rows.append(
                {
                    **common,
                    "teacher": teacher,
                    "tokens": record.tokens[k],
                    "weight": record.weight[k],
                    "nll": record.nll[k],
                    **{axis: score[k] for axis, score in axes.items()},
                }
            )
        for teacher, tokens, validity in record.unread:
            row = {**common, "teacher": teacher, "tokens": tokens, "weight": 0.0}
            rows.append(row if validity is None else {**row, "validity": validity})
    return rows


def add_scores(means: Means, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows of the score log to the means "weight/TEACHER" and "AXIS/TEACHER"."""
    for row in rows:
        for name in ("weight", *(axis for axis in AXES if axis in row)):
            means.add(f"{name}/{row['teacher']}", row[name])


class EvalMeans:
    """Means over the problems of an evaluation."""

    def __init__(self) -> None:
        self._means = Means()

    def add(self, loss: float, records: Sequence[ProblemRecord], items: Sequence[Item]) -> None:
        """Adds a micro-batch; `loss` is the mean over its counted problems."""
        counted = [r for r, item in zip(records, items, strict=True) if item.counted]
        self._means.add("loss", loss * len(counted), sum(r.has_loss for r in counted))
        self._means.add("nll", sum(sum(r.nll) / len(r.nll) for r in counted), len(counted))
        levels = [r.levels[-1] for r in counted if r.levels]
        self._means.add("gold_logp", sum(levels), len(levels))

    def take(self, not_finite: str | None, *, alone: bool) -> dict[str, float]:
        """Returns the means over all ranks, without those of no problem.

        A loss over no problem is not 0, which would be the best of all.

        Args:
            not_finite: the error of this rank if a loss was not finite, or None.
            alone: whether this is the only process.

        Raises:
            NonFiniteError: a loss was not finite on some rank; raised on every rank.
        """
        if alone:
            return self._means.take()
        ranks = gather_object([(self._means.sums, not_finite)])
        bad = [what for _, what in ranks if what is not None]
        if bad:
            raise NonFiniteError(bad[0])
        together = Means()
        for sums, _ in ranks:
            for name, (total, count) in sums.items():
                together.add(name, total, count)
        return together.take()


def with_kept_levels(pass_: Pass, kept: Sequence[list[float] | None]) -> Pass:
    """Returns the pass, with the levels of an earlier step for the problems that have kept them.

    Args:
        pass_: a pass. It has no answer leaves if every problem has kept its levels.
        kept: for each problem its levels, leaves in order and the bare question's last; empty
            without a gold answer. None takes the levels of the pass.
    """
    if all(levels is None for levels in kept):
        return pass_
    batch, host = pass_.batch, pass_.batch.on_host
    problems = batch.problems
    asked = [r.asked_steps if p.gold_ids else () for p in problems for r in p.rationales]
    counts = [len(steps) for steps in asked]
    # Indices into the levels of the pass and, after them, those that were kept.
    of_steps, of_questions, known = list[int](), list[int](), list[float]()
    for p, levels in enumerate(kept):
        first = pass_.leaf_logp.numel() + len(known)
        if levels is None:
            found = _leaves_of(host, p)
        else:
            found = list(range(first, first + len(levels)))
            known += levels
        of_steps += found[:-1]
        of_questions += found[-1:]
    steps = [i for mine in asked for i in mine] + [-1] * len(of_questions)
    tables: dict[str, Any] = {
        "leaf_offsets": torch.tensor([0, *counts]).cumsum(0),
        "leaf_step": torch.tensor(steps, dtype=torch.int64),
        "question_leaf": torch.tensor(question_leaves(problems, sum(counts))),
    }
    device = batch.target.device
    order = torch.tensor(of_steps + of_questions, dtype=torch.int64)
    *sent, index = send([*tables.values(), order], device)
    there: dict[str, Any] = dict(zip(tables, sent, strict=True))
    every = torch.cat([pass_.leaf_logp, put(known, pass_.leaf_logp, pass_.leaf_logp.dtype)])
    batch = replace(
        batch,
        **there,
        host=None if batch.host is None else replace(batch.host, **tables),
    )
    return replace(pass_, batch=batch, leaf_logp=every[index])


def _leaves_of(batch: Batch, problem: int) -> list[int]:
    """Returns the leaves of a problem, that of the bare question last; [] without gold."""
    first, end = batch.leaf_offsets[batch.problem_offsets[problem : problem + 2]].tolist()
    question = int(batch.question_leaf[problem])
    return [*range(first, end), *([question] if question >= 0 else [])]
