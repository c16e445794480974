"""Builders: strategies that rewrite the rationales with the student before training, and keep them.

The rows lie in `output_dir`/NAME.jsonl. A run that is killed and resumed, or another process of the
run, reads them there and does not build again.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import PartialState
from torch import nn

from compact.data import Problem, Rationale
from compact.resumable import ResumableRows
from compact.strategies.base import Strategy
from compact.student import Student

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.weighting import Weigher

Counts = dict[str, float]


class Builder(Strategy):
    """Rewrites the rationales of each problem once, before the first step.

    Attributes:
        name: name of the strategy, and of its file of rows.
        settings: what the rows depend on besides problems and student, as JSON values.
    """

    needs_whole_model: ClassVar[bool] = True
    name: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.seed, self.max_length, self.folder = 0, 2560, Path("runs/compact")
        self.device: Any = None
        self._log: Counts = {}

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps seed, length and folder of the run."""
        self.seed, self.max_length = args.seed, args.max_length
        self.folder, self.device = Path(args.output_dir or "."), args.device

    @abstractmethod
    def build(self, problem: Problem, student: Student) -> tuple[list[str], Counts]:
        """Returns the new completion of each rationale, and what was done, as counts to add up."""

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Returns the problems with their new rationales.

        Raises:
            ValueError: `output_dir` has rows that were built with other settings.
            OSError: a row cannot be written.
        """
        if self.device is not None:
            model.to(self.device)
        student, training = Student.of(model, processing_class), model.training
        model.eval()
        settings = self.settings | {
            "seed": self.seed,
            "max_length": self.max_length,
            "student": _fingerprint(model),
            "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        }
        # The other processes read the rows of the first.
        with PartialState().main_process_first():
            rows = self._rows(problems, student, settings)
        model.train(training)
        self._log = _sums([row["counts"] for row in rows.values()])
        return [_rebuilt(problem, rows[problem.question_id]) for problem in problems]

    def _rows(
        self, problems: Sequence[Problem], student: Student, settings: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        path = self.folder / f"{self.name}.jsonl"
        with ResumableRows(path, settings, key="question_id") as rows:
            todo = [p for p in problems if p.question_id not in rows.done]
            for problem in todo:
                texts, counts = self.build(problem, student)
                rows.append(
                    {"question_id": problem.question_id, "completions": texts, "counts": counts}
                )
            if todo:
                rows.complete(_sums([row["counts"] for row in rows.done.values()]))
            return dict(rows.done)

    def take_log(self) -> dict[str, float]:
        """Returns the sums of the counts, once."""
        found, self._log = self._log, {}
        return found


def _rebuilt(problem: Problem, row: Mapping[str, Any]) -> Problem:
    rationales = tuple(
        Rationale(old.teacher, text, old.line)
        for old, text in zip(problem.rationales, row["completions"], strict=True)
    )
    return replace(problem, rationales=rationales)


def _sums(counts: Sequence[Mapping[str, float]]) -> Counts:
    names = dict.fromkeys(name for own in counts for name in own)
    return {name: float(sum(own.get(name, 0.0) for own in counts)) for name in names}


def _fingerprint(model: nn.Module) -> str:
    """Returns a hash that changes when a parameter changes."""
    sums = [(name, float(p.detach().double().sum())) for name, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
