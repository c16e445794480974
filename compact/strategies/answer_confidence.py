"""Answer confidence: weights from how sure each white-box teacher is of the answer that it gives.

    c_k = exp( (1 / |A_k|) sum_{t in A_k} log p_k(y_t | q, y_<t) ),   alpha = softmax_k(c_k / tau)

p_k is the local model of teacher k, y its rationale and A_k the tokens of y from the answer marker
on; c_k is 0 if y has none. With `margin`, a question counts as much as its two surest teachers
differ, divided by the mean of this over all questions.

Source: MUKI (arXiv 2210.05230), whose teachers are classifiers with a softmax to read. Ours: text,
so the softmax is that of the answer's tokens. The policy `muki` is the same for teachers that can
only be sampled. The teachers are frozen, so their confidences are computed once, before training,
by the first of several processes, and kept in `output_dir`/answer-confidence.jsonl.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compact.means import Means
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.lazily import LazyProblems
from compact.passes.transfer import put
from compact.resumable import ResumableRows
from compact.settings import MAX_LENGTH, OUTPUT_DIR
from compact.strategies.base import Strategy, check_markers, register_strategy
from compact.strategies.building import fingerprint, of_the_first
from compact.strategies.white_box import WhiteBoxes, teacher_states
from compact.weighting.muki import margin_of

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.student import Student
    from compact.weighting import Weigher, Weights


@register_strategy("answer-confidence")
class AnswerConfidence(Strategy):
    """Weights from how likely each white-box teacher finds its own answer (MUKI)."""

    needs = ("white-box teacher",)

    def __init__(
        self,
        teachers: str | dict[str, str],
        tau: float = 0.2,
        margin: bool = False,
        dtype: str = "bfloat16",
    ) -> None:
        """Sets up the weights.

        Args:
            teachers: the white-box model of each teacher of the data, by name; one text for all.
            tau: temperature of the softmax over the teachers.
            margin: whether a question counts as much as its two surest teachers differ.
            dtype: of the teachers' weights.

        Raises:
            ValueError: a value is not allowed.
        """
        check_number("tau of answer-confidence", tau, above=0)
        self.white_boxes = WhiteBoxes("answer-confidence", teachers, dtype)
        self.tau, self.margin = tau, margin
        self.device: Any = "cpu"
        self.max_length, self.folder = MAX_LENGTH, Path(OUTPUT_DIR)
        self.table: dict[str, dict[str, float]] = {}  # question_id -> teacher -> c
        self.mean_margin = 1.0
        self._means = Means()

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses a preset: the strategy gives the weights."""
        if args.preset != "uniform":
            raise ValueError(
                "preset must be uniform with strategy answer-confidence, which gives the weights "
                f"itself, got {args.preset!r}"
            )
        self.device, self.max_length = args.device, args.max_length
        self.folder = Path(args.output_dir or ".")

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Computes the confidences; the teachers are not needed afterwards.

        Raises:
            ValueError: a teacher of the data has no white-box model, no rationale has an answer to
                judge, or `output_dir` has confidences of other teachers or data.
            OSError: a confidence cannot be written.
        """
        encoded = LazyProblems(problems, processing_class, judged=False, max_length=self.max_length)
        check_markers("answer-confidence", encoded, "their confidence is 0")
        self.table = of_the_first(partial(self._rows, problems, encoded, processing_class))
        margins = [float(margin_of(torch.tensor([*c.values()]))) for c in self.table.values()]
        self.mean_margin = sum(margins) / max(len(margins), 1) or 1.0
        for own in self.table.values():
            for teacher, value in own.items():
                self._means.add(f"confidence/{teacher}", value)
        return problems

    def _rows(
        self, problems: Sequence[Problem], encoded: LazyProblems, processing_class: Any
    ) -> dict[str, dict[str, float]]:
        """Returns question_id -> teacher -> c; what a killed run has computed is read."""
        self.white_boxes.load(problems, processing_class, self.device)
        models, self.white_boxes.models = self.white_boxes.models, {}  # not needed any more
        each = {id(model): model for model in models.values()}  # one may stand for several
        hashes = {key: fingerprint(model.model) for key, model in each.items()}
        settings = {
            "teachers": {name: hashes[id(model)] for name, model in models.items()},
            "max_length": self.max_length,
            "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        }
        path, shape = self.folder / "answer-confidence.jsonl", {"confidences": {str: float}}
        with ResumableRows(path, settings, key="question_id", shape=shape) as rows:
            todo = [i for i, p in enumerate(problems) if p.question_id not in rows.done]
            for i in todo:
                found = confidences(encoded[i], models)
                rows.append({"question_id": problems[i].question_id, "confidences": found})
            if todo:
                rows.complete({})
            return {p.question_id: rows.done[p.question_id]["confidences"] for p in problems}

    def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
        """Returns softmax(c / tau) of each problem, times its margin if asked for."""
        parts = []
        for problem in pass_.batch.problems:
            own = self.table[problem.question_id]
            c = torch.tensor([own[r.teacher] for r in problem.rationales])
            factor = float(margin_of(c)) / self.mean_margin if self.margin else 1.0
            parts.append((c / self.tau).softmax(0) * factor)
        return put(torch.cat(parts).tolist(), weights.weight)

    def take_log(self) -> dict[str, float]:
        """Returns the mean confidence of each teacher, once."""
        return self._means.take()


@torch.no_grad()
def confidences(problem: EncodedProblem, models: Mapping[str, Student]) -> dict[str, float]:
    """Returns teacher -> c of the rationales of a problem."""
    found = {}
    for rationale in problem.rationales:
        teacher = models[rationale.teacher]
        states = teacher_states(teacher, [replace(problem, rationales=(rationale,))])
        answer = torch.tensor(rationale.ids[rationale.marker :], device=states.device)
        if not len(answer):
            found[rationale.teacher] = 0.0
            continue
        nll = teacher.token_stats(states[rationale.marker :], answer).nll
        found[rationale.teacher] = float((-nll.float().mean()).exp())
    return found
