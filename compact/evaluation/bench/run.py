"""Runs the bench over labelled files, from a student's name to the pages."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compact.data import Problem
from compact.data.labelled import load_labelled
from compact.data.rows import content_of_rows
from compact.evaluation.bench.collect import collect
from compact.evaluation.bench.pages import check_pages, write_pages
from compact.evaluation.bench.texts import judge_texts
from compact.evaluation.processes import part_of
from compact.files import check_output, content_of_student
from compact.lab.zoo import ZOOS
from compact.lab.zoo_student import CACHE, STAGES, load_zoo_student
from compact.student import Student, load_model

_ZOO_SEED = 1


def bench(
    files: Sequence[str | Path],
    model: str | None,
    out: Path,
    *,
    only: Sequence[str] = (),
    limit: int | None = None,
    part: str = "1/1",
    max_length: int = 1536,
) -> str:
    """Measures every metric, preset and policy on labelled rationales; returns the page.

    Args:
        files: labelled rationales (`compact.data.labelled`), or names of zoos: zoo-a, zoo-b, zoo-c.
            Their names are the columns.
        model: name of the student, or zoo-early, zoo-middle, zoo-late for that of a zoo; None for
            the scores that need none.
        out: folder of the pages and of one file of rows per data file, from which a run resumes.
        only: names of metrics, presets and policies; () for all. Without a model unused, as is
            `max_length`.
        limit: most questions of each file, drawn at random with seed 0; None for all.
        part: "k/N": only the questions whose id, hashed, is k - 1 modulo N.
        max_length: most tokens of the prompt and one rationale.

    Raises:
        ValueError: two files have one name, an argument is not allowed, a file to write is an
            input, or as `load_labelled`.
        OSError: a page is a file of somebody else.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    index, count = part_of(part)
    # A data set that is a folder ("svamp/train.jsonl") is called by the folder.
    paths = [Path(file).absolute() for file in files]
    names = [path.parent.name if path.stem in ("train", "test") else path.stem for path in paths]
    zoos = {f"zoo-{key}": the_zoo for key, the_zoo in ZOOS.items()}
    if len(set(names)) < len(names):
        raise ValueError(f"DATA must have different names, got {', '.join(map(str, files))}")
    out.mkdir(parents=True, exist_ok=True)
    data = [file for file in files if file not in zoos]
    check_pages(out, data)
    if model is not None:
        for name in names:
            check_output(out / f"{name}.jsonl", *data)
    loaded = [
        load_labelled(zoos[str(file)].labelled_rows(_ZOO_SEED) if file in zoos else file)
        for file in files
    ]
    student = None
    if model is not None:
        stage = model.removeprefix("zoo-")
        if stage != model and stage in STAGES:
            load_zoo_student(stage)
            model = str(CACHE / f"{stage}-0")
        network, processing_class = load_model(model)
        student = Student.of(network, processing_class)
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, file, (problems, labels) in zip(names, files, loaded, strict=True):
        chosen = [p for p in problems if _hash(p) % count == index - 1]
        if limit is not None and limit < len(chosen):
            drawn = {p.question_id for p in random.Random(0).sample(chosen, limit)}
            chosen = [p for p in chosen if p.question_id in drawn]
        if not chosen:
            raise ValueError(f"{file}: part {part} has no question")
        if student is None:
            sets[name] = judge_texts(chosen, labels, name)
            continue
        settings = {
            "data": f"seed {_ZOO_SEED}" if file in zoos else content_of_rows(file),
            "model": model,
            "weights": content_of_student(model),
            "limit": limit,
            "part": part,
            "max_length": max_length,
        }
        rows = out / f"{name}.jsonl"
        sets[name] = collect(
            student,
            processing_class,
            chosen,
            labels,
            rows,
            settings,
            max_length=max_length,
            only=only,
        )
    asked = f", at most {limit} questions of each file" if limit else ""
    whole = "" if part == "1/1" else f", part {part} of the questions"
    about = "No student: scores of the texts" if model is None else f"Student: {model}"
    return write_pages(out, sets, f"{about}{asked}{whole}.")


def _hash(problem: Problem) -> int:
    return int(hashlib.sha256(problem.question_id.encode()).hexdigest(), 16)
