"""Compares a student with the base model that it started from, for `compact evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from compact.data import Problem
from compact.evaluation.forgetting import ANSWERS, TEXT, Text, paired_drop, text_drift
from compact.evaluation.latent import layer_drift
from compact.files import json_lines
from compact.resumable import add_to_summary, read_summary

MOST_ANSWERS = 100
"""Most of the student's own answers on which its drift from the base is measured."""
Answer: TypeAlias = Callable[[Literal["base", "student"], str, Sequence[Problem], Path], Any]
"""Lets base or student answer the questions of a file (its name, the problems) into a file."""


def task_drops(
    answer: Answer, tasks: Mapping[str, Sequence[Problem]], out: Path
) -> dict[str, dict[str, float]]:
    """Answers files of questions with base and student; returns file -> `paired_drop`.

    Args:
        answer: as `Answer`.
        tasks: file -> its questions.
        out: the items of the evaluation; those of a task are OUT.TASK.base.jsonl and
            OUT.TASK.student.jsonl beside it.
    """
    drops = {}
    for path, problems in tasks.items():
        name = f"{out.stem}.{Path(path).stem}"
        base, student = (out.with_name(f"{name}.{of}.jsonl") for of in ("base", "student"))
        answer("base", path, problems, base)
        answer("student", path, problems, student)
        drops[path] = paired_drop(base, student)
    return drops


def drift(
    student: Any,
    base: Any,
    processing_class: Any,
    *,
    retained: tuple[str, Sequence[Text]],
    answers: tuple[str, Sequence[Text]],
) -> dict[str, Any]:
    """Returns `text_drift` on each set of texts, and `layers`, the `layer_drift` on both.

    Args:
        student: the distilled model.
        base: the model that it started from; `student` itself for an adapter.
        processing_class: the tokenizer of both.
        retained: what to call the retained texts, and these; none are left out.
        answers: the same of the student's own answers.
    """
    texts = {TEXT: retained, ANSWERS: answers}
    known = {name: (data, list(these)) for name, (data, these) in texts.items() if these}
    given = (student, base, processing_class)
    found: dict[str, Any] = {
        name: {"data": data} | text_drift(*given, these) for name, (data, these) in known.items()
    }
    return found | {"layers": layer_drift(*given, {name: x for name, (_, x) in known.items()})}


def own_answers(problems: Sequence[Problem], out: Path) -> list[Text]:
    """Returns the student's answers to the first `MOST_ANSWERS` questions, with their prompts.

    Args:
        problems: the questions.
        out: the items with the answers.
    """
    given = {item["question_id"]: item["completion"] for _, _, item in json_lines(out)}
    return [
        (p.prompt, given[p.question_id])
        for p in problems[:MOST_ANSWERS]
        if given.get(p.question_id)
    ]


def add_forgetting(out: Path, found: dict[str, Any]) -> None:
    """Adds what was measured to the summary of an evaluation; earlier tasks are kept.

    Raises:
        ValueError, OSError: as `add_to_summary`.
    """
    earlier = read_summary(out).get("forgetting", {})
    earlier = earlier if isinstance(earlier, dict) else {}
    tasks = earlier.get("tasks", {}) | found["tasks"]
    add_to_summary(out, {"forgetting": earlier | found | {"tasks": tasks}})
