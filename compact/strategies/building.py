"""Builders: strategies that rewrite the rationales before training, and keep them.

What is written anew, the student writes, or a writer: a function, or a teacher of teachers.yaml.
The rows lie in `output_dir`/NAME.jsonl, with null for a rationale that stays as it is. A run that
is killed and resumed reads them there and does not build again. Of several processes, the first
builds.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from torch import distributed, nn

from compact.data import Problem, Rationale
from compact.options import check_number
from compact.passes.encode import encode_prompt
from compact.resumable import ResumableRows
from compact.settings import MAX_LENGTH, OUTPUT_DIR
from compact.strategies.base import Strategy
from compact.student import Student, evaluating
from compact.student.generation import generate_in_room
from compact.teachers.tasks import Work, find_writer, work_off

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.weighting import Weigher

T = TypeVar("T")
Counts = dict[str, float]
Rows = tuple[list[str | None], Counts]
Built = Work[Rows]
_PATIENCE = timedelta(days=30)
"""How long a process waits for what the first one builds."""


class Builder(Strategy):
    """Rewrites the rationales of each problem once, before the first step.

    Attributes:
        name: name of the strategy, and of its file of rows.
        settings: what the rows depend on besides problems and student, as JSON values.
        writer: who answers the tasks; None: the student.
    """

    needs_whole_model: ClassVar[bool] = True
    name: ClassVar[str]

    def __init__(self, writer: str, budget: float | None, **settings: Any) -> None:
        """Keeps the settings.

        Args:
            writer: "student", or as in `find_writer`.
            budget: as in `find_writer`.
            **settings: the others, with `max_new_tokens`.

        Raises:
            ValueError, OSError: as in `find_writer`.
        """
        if budget is not None:
            check_number(f"budget of {self.name}", budget, least=0)
        self.writer = None if writer == "student" else find_writer(writer, budget=budget)
        if self.writer is None and budget is not None:
            raise ValueError(f"budget of {self.name} must stand with another writer, got {budget}")
        check_number(
            f"max_new_tokens of {self.name}", settings["max_new_tokens"], least=1, whole=True
        )
        self.settings = settings | {"writer": self.writer.settings if self.writer else writer}
        self.seed, self.max_length, self.folder = 0, MAX_LENGTH, Path(OUTPUT_DIR)
        self.device: Any = None
        self._log: Counts = {}

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps seed, length and folder of the run."""
        self.seed, self.max_length = args.seed, args.max_length
        self.folder, self.device = Path(args.output_dir or "."), args.device

    @abstractmethod
    def build(self, problem: Problem, student: Student) -> Built:
        """Returns the new completion of each rationale, and what was done, as counts to add up.

        A completion of None keeps the rationale unchanged. The method yields tasks for the writer;
        without another writer, the student does them.
        """

    def built(self, problems: Sequence[Problem], student: Student) -> dict[str, Rows]:
        """Returns question_id -> what `build` returns, for several problems side by side."""
        write = self.writer.write if self.writer else partial(self._student_writes, student)
        return work_off({p.question_id: self.build(p, student) for p in problems}, write)

    def _student_writes(self, student: Student, prompts: Sequence[str]) -> list[list[str]]:
        """Returns the student's greedy answer to each prompt."""
        tokenizer = student.tokenizer
        ids = [encode_prompt(text, tokenizer) for text in prompts]
        found = generate_in_room(student.model, tokenizer, ids, self.settings["max_new_tokens"])
        return [[str(tokenizer.decode(each, skip_special_tokens=True))] for each in found]

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
        student = Student.of(model, processing_class)
        with evaluating(model):
            rows = of_the_first(partial(self._rows, problems, student))
        self._log = _sums([row["counts"] for row in rows.values()])
        return [_rebuilt(problem, rows[problem.question_id]) for problem in problems]

    def _rows(self, problems: Sequence[Problem], student: Student) -> dict[str, dict[str, Any]]:
        settings = self.settings | {
            "seed": self.seed,
            "max_length": self.max_length,
            "student": fingerprint(student.model),
            "problems": hashlib.sha256(repr(problems).encode()).hexdigest(),
        }
        path = self.folder / f"{self.name}.jsonl"
        with ResumableRows(path, settings, key="question_id") as rows:
            todo = [p for p in problems if p.question_id not in rows.done]
            at_once = self.writer.at_once if self.writer else 1
            for start in range(0, len(todo), at_once):
                for question_id, (texts, counts) in self.built(
                    todo[start : start + at_once], student
                ).items():
                    rows.append(
                        {"question_id": question_id, "completions": texts, "counts": counts}
                    )
            if todo:
                rows.complete(_sums([row["counts"] for row in rows.done.values()]))
            return dict(rows.done)

    def take_log(self) -> dict[str, float]:
        """Returns the sums of the counts, once."""
        found, self._log = self._log, {}
        return found


def reads_gold(problem: Problem) -> Callable[[str], str | None]:
    """Returns what reads a text whose stated answer is the gold one; None for any other text."""
    domain = problem.domain
    return lambda text: text if domain.matches(domain.extract(text), problem.answer) else None


def of_the_first(make: Callable[[], T]) -> T:
    """Returns what `make` returns in the first process; it is not called in the others.

    What is made may take longer than `ddp_timeout`, after which a barrier would end the run. So the
    others wait in a group of their own, for `_PATIENCE` at most.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    found: list[Any] = [make() if state.is_main_process else None]
    distributed.broadcast_object_list(found, src=0, group=group)
    made: T = found[0]
    return made


def _rebuilt(problem: Problem, row: Mapping[str, Any]) -> Problem:
    rationales = tuple(
        old if text is None else Rationale(old.teacher, text, old.line)
        for old, text in zip(problem.rationales, row["completions"], strict=True)
    )
    return replace(problem, rationales=rationales)


def _sums(counts: Sequence[Mapping[str, float]]) -> Counts:
    names = dict.fromkeys(name for own in counts for name in own)
    return {name: float(sum(own.get(name, 0.0) for own in counts)) for name in names}


def fingerprint(model: nn.Module) -> str:
    """Returns a hash that changes when a parameter changes."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {parameter.dtype} {[*parameter.shape]}".encode())
        data = parameter.detach().cpu().contiguous().flatten()
        found.update(data.view(torch.uint8).numpy().data)
    return found.hexdigest()
