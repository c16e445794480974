"""Tasks: what a builder of training data asks a writer, and what it reads from the answers.

A builder works on each problem as a generator: it yields tasks and gets back what was read from
their answers. So it is written for one problem, and the requests of many problems are sent at the
same time. A writer is a function of yours, or a teacher of teachers.yaml, whose answers are kept in
a store beside that file (`.sqlite`): no run pays for an answer twice.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from compact.data.problems import Problem
from compact.teachers.collect import ask_all
from compact.teachers.prompts import QUESTION
from compact.teachers.spec import Teacher, read_teachers
from compact.teachers.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """One request to a writer.

    Attributes:
        prompt: the filled template.
        read: answer -> what is read from it, None if it is of no use.
    """

    prompt: str
    read: Callable[[str], str | None]


Work = Generator[Sequence[Task], Sequence[str | None], T]
"""Yields tasks, gets what was read from the answer to each, returns the result of a problem."""
Write = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""From prompts to the samples of each; no sample where there is no answer."""


@dataclass(frozen=True)
class Writer:
    """Who answers tasks.

    Attributes:
        write: asks.
        at_once: problems to work on at the same time.
        settings: what the answers depend on, as JSON values.
    """

    write: Write
    at_once: int
    settings: dict[str, Any]


def work_off(works: Mapping[str, Work[T]], write: Write) -> dict[str, T]:
    """Works on several problems side by side: one request for all tasks of a round.

    Of the samples of a task, the first from which something is read counts.

    Args:
        works: key -> work.
        write: who answers.

    Returns:
        Key -> result.
    """
    found: dict[str, T] = {}
    answers: dict[str, Any] = dict.fromkeys(works)
    while answers:
        tasks: dict[str, Sequence[Task]] = {}
        for key, given in answers.items():
            try:
                tasks[key] = works[key].send(given)
            except StopIteration as end:
                found[key] = end.value
        prompts = [task.prompt for own in tasks.values() for task in own]
        samples = iter(write(prompts) if prompts else ())
        answers = {key: [_read(task, next(samples)) for task in own] for key, own in tasks.items()}
    return found


def find_writer(text: str, *, budget: float | None = None) -> Writer:
    """Returns the writer that a setting names.

    Args:
        text: FILE.yaml:TEACHER, or MODULE:FUNCTION, a function from prompts to as many texts.
        budget: most that the teacher's store may cost in all.

    Raises:
        ValueError: the text names neither.
        OSError: the file cannot be read.
    """
    place, _, name = text.rpartition(":")
    if place.endswith((".yaml", ".yml")):
        return _of_teacher(Path(place), name, budget)
    if budget is not None:
        raise ValueError(f"budget must stand with a writer FILE.yaml:TEACHER, got {text!r}")
    return Writer(_of_function(place, name, text), 1, {"writer": text})


def _read(task: Task, samples: Sequence[str]) -> str | None:
    found = (task.read(sample) for sample in samples)
    return next((each for each in found if each is not None), None)


def _of_function(module: str, name: str, text: str) -> Write:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"writer must be student, FILE.yaml:TEACHER or MODULE:FUNCTION, got {text!r} ({error})"
        ) from None

    def write(prompts: Sequence[str]) -> list[list[str]]:
        texts = function(prompts)
        if len(texts) != len(prompts):
            raise ValueError(
                f"writer {text} must return a text for each of {len(prompts)} requests, got "
                f"{len(texts)}"
            )
        return [[each] for each in texts]

    return write


def _of_teacher(path: Path, name: str, budget: float | None) -> Writer:
    teachers = {teacher.name: teacher for teacher in read_teachers(path)}
    if name not in teachers:
        raise ValueError(f"writer must be a teacher of {path}, got {name!r}: {', '.join(teachers)}")
    teacher = replace(teachers[name], template=QUESTION)  # a task's prompt is whole
    settings = {"writer": name, "system": teacher.system, "n": teacher.n} | teacher.parameters()

    def write(prompts: Sequence[str]) -> list[list[str]]:
        store = Store(path.with_suffix(".sqlite"))
        try:
            return _ask(store, teacher, prompts, budget)
        finally:
            store.close()

    return Writer(write, teacher.concurrency, settings)


def _ask(
    store: Store, teacher: Teacher, prompts: Sequence[str], budget: float | None
) -> list[list[str]]:
    """Returns the samples of each prompt: none that is empty, cut ones only with `keep_cut`."""
    problems = [Problem(text, text, None, ()) for text in dict.fromkeys(prompts)]
    found = ask_all(store, teacher, problems, called=f"writer {teacher.name}", budget=budget)
    refused = sum(answer is None for _, answer in found)
    if refused:
        logger.warning("writer %s: %d requests were refused", teacher.name, refused)
    samples: dict[str, list[str]] = {text: [] for text in prompts}
    for item, answer in found:
        if answer is None or not answer.text.strip():
            continue
        if answer.finish != "length" or teacher.keep_cut:
            samples[item.problem.question_id].append(answer.text)
    return [samples[text] for text in prompts]
