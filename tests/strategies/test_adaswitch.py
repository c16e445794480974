"""AdaSwitch: the point of the switch, its two limits, the loss, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.strategies.adaswitch import AdaSwitch, switch_point
from compact.student import Student
from compact.student.generation import generate
from helpers.resuming import assert_resumes
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train


@pytest.mark.parametrize("planted", [0, 1, 5, 30, 59])
def test_switch_within_two_tokens_of_a_perturbation(planted: int) -> None:
    """Divergences of about 0.1 that grow tenfold at a planted token."""
    g = torch.Generator().manual_seed(planted)
    d = (0.1 * (0.7 + 0.6 * torch.rand(60, generator=g))).tolist()
    d[planted:] = [10 * x for x in d[planted:]]
    found = switch_point(d, 3.0, 16)
    assert found is None if planted == 0 else found is not None and abs(found - planted) <= 2
    assert switch_point(d, math.inf, 16) is None and switch_point(d, 0.0, 16) == 0


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    folder = tmp_path / "teacher"
    save_student(folder)
    return str(folder)


def _strategy(teacher: str, tokenizer: Any, **options: Any) -> AdaSwitch:
    given = {"max_new_tokens": 12, "temperature": 0.0, "dtype": "float32"} | options
    strategy = AdaSwitch(teacher, **given)
    strategy.prepare([], torch.nn.Identity(), tokenizer)
    return strategy


def test_limits_are_on_policy_and_off_policy(teacher: str) -> None:
    """K = infinity: the student's own text, token by token; K = 0: the teacher's."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    problems = [
        encode_problem(p, tokenizer, max_length=400) for p in load_problems(rows_of("good"))
    ]
    prompts = [p.prompt_ids for p in problems]
    for factor, model in ((math.inf, student), (0.0, None)):
        strategy = _strategy(teacher, tokenizer, factor=factor)
        model = strategy.white_box if model is None else model
        want = generate(model.model, tokenizer, prompts, 12)
        mixed = strategy.rollout(problems, student)
        end = tokenizer.eos_token_id
        for problem, ids in zip(mixed, want, strict=True):
            (rationale,) = problem.rationales
            assert list(rationale.ids) == (ids if len(ids) == 12 else [*ids, end])
        log = strategy.take_log()
        assert log["switched"] == float(factor == 0.0)


def test_the_prefix_before_the_switch_is_the_students(teacher: str) -> None:
    """With K between, the text is the student's up to the switch and the teacher's after it."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 3, hidden=32, layers=1).eval(), tokenizer)
    (problem,) = (
        encode_problem(p, tokenizer, max_length=400)
        for p in load_problems(rows_of("good", problems=1))
    )
    own = generate(student.model, tokenizer, [problem.prompt_ids], 12)[0]
    strategy = _strategy(teacher, tokenizer, factor=1.0, window=4)
    plain = _strategy(teacher, tokenizer, factor=math.inf).rollout([problem], student)
    (at,) = strategy._switches(plain, student)
    assert at is not None
    (mixed,) = strategy.rollout([problem], student)
    ids = mixed.rationales[0].ids
    assert list(ids[:at]) == own[:at]
    begun = (*problem.prompt_ids, *own[:at])
    rest = generate(strategy.white_box.model, tokenizer, [begun], 12)[0]
    assert list(ids[at : at + 4]) == rest[:4]


def test_resumes(tmp_path: Path, teacher: str) -> None:
    options = {"teacher": teacher, "max_new_tokens": 6, "dtype": "float32"}
    assert_resumes(tmp_path / "runs", strategy="adaswitch", strategy_options=options)


def test_refused(tmp_path: Path, teacher: str) -> None:
    with pytest.raises(ValueError, match="preset must be uniform with strategy adaswitch"):
        train(
            tmp_path,
            rows_of(*TEACHERS),
            preset="robust",
            strategy="adaswitch",
            strategy_options={"teacher": teacher},
        )
    for options in ({"kind": "l2"}, {"factor": -1}, {"window": 0}, {"temperature": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} of adaswitch must be .*got"):
            AdaSwitch(teacher, **options)  # type: ignore[arg-type]
