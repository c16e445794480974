"""Filler on a trained student of the teacher zoo: it must not raise `robust` adaptability."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import load_zoo_student
from compact.metrics import get_metric
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import PRESETS

QUESTIONS, REPEATS = 24, 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the students: trained anew, so that they know the zoo as it is now."""
    return tmp_path_factory.mktemp("students")


def with_and_without(stage: str, seed: int, preset: str, cache: Path) -> torch.Tensor:
    """[QUESTIONS, 2] adaptability of a right rationale, plain and with ten fillers everywhere."""
    model, tokenizer = load_zoo_student(stage, seed, cache=cache)
    student = Student.of(model, tokenizer)
    metric = get_metric(PRESETS[preset].adaptability)
    rng = random.Random(seed)
    rows = []
    for row in zoo.make_rows(("good",), QUESTIONS, seed=1000 + seed):
        filled = zoo.with_filler(row["completion"], rng, REPEATS)
        rows += [row, row | {"teacher": "filled", "completion": filled}]
    problems = [encode_problem(p, tokenizer, max_length=1000) for p in load_problems(rows)]
    scores = []
    for start in range(0, QUESTIONS, 4):
        batch = build_batch(
            problems[start : start + 4],
            layout="padded" if metric.needs.padded else "tree",
            leaves=metric.needs.leaves,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.no_grad():
            scores.append(metric.score(run_pass(student, batch)[2]))
    return torch.cat(scores).view(QUESTIONS, 2)


# The late student first: on its way it leaves the middle one behind.
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "seed"), [("late", 0), ("middle", 0), ("middle", 101)])
def test_filler_does_not_raise_robust_adaptability(stage: str, seed: int, cache: Path) -> None:
    """Neither the mean nor the median; single questions that the student then gets right may.

    `released` is raised in nearly every question. Processors round differently and so train
    different students: .00 to .29 of the questions rose under `robust`, .92 to 1 under `released`.
    """
    plain, filled = with_and_without(stage, seed, "robust", cache).unbind(1)
    rise = filled - plain
    assert float(rise.mean()) <= 0.0, rise
    assert float(rise.median()) <= 0.0, rise
    assert float((rise > 0).float().mean()) <= 0.4, rise
    plain, filled = with_and_without(stage, seed, "released", cache).unbind(1)
    assert float((filled > plain).float().mean()) >= 0.75
