"""ORION: wrong answers lead to rewritten rationales, which the gold answer checks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from compact.data import Problem, load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.strategies import orion
from compact.strategies.building import Rows
from compact.strategies.orion import Orion
from compact.student import Student
from helpers.resuming import assert_resumes
from helpers.trajectories import TEACHERS, rows_of, train


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a writer that returns `texts` and keeps the requests."""
    module = ModuleType("planted_writer")
    module.texts, module.requests = [], []  # type: ignore[attr-defined]

    def write(requests: list[str]) -> list[str]:
        module.requests.extend(requests)
        return module.texts[: len(requests)]

    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted_writer", module)
    return module


def rewritten(problem: Problem, student: Student) -> Rows:
    return Orion("planted_writer:write").built([problem], student)[problem.question_id]


def _student_of(teacher: str, steps: int = 60) -> Student:
    """A student trained on the texts of a teacher of the zoo."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0, hidden=32, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = zoo.make_rows((teacher,), 24, seed=11)
    encoded = tokenizer([row["completion"] for row in rows], padding=True, return_tensors="pt")
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=encoded.input_ids, labels=labels).loss.backward()
        optimizer.step()
    return Student.of(model.eval(), tokenizer)


def test_a_planted_bug_is_rewritten(writer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student errs in one step, in its own wording; the writer corrects that wording.

    The new text holds the corrected step, passes the gold filter, and the student finds it
    likelier than the teacher's verbose one.
    """
    student = _student_of("wrong-step")
    rows = {r["teacher"]: r for r in zoo.make_rows(("verbose", "good", "wrong-step"), 1, seed=11)}
    (problem,) = load_problems([rows["verbose"]])
    bug, fixed = rows["wrong-step"]["completion"], rows["good"]["completion"]
    tokens = student.processing_class(bug)["input_ids"]
    monkeypatch.setattr(orion, "generate_in_room", lambda m, t, p, *_, **__: [tokens] * len(p))
    writer.texts = [fixed]
    (text,), counts = rewritten(problem, student)
    corrected = [line for line in fixed.split("\n") if line not in bug.split("\n")]
    assert corrected and all(line in text for line in corrected)
    assert bug in writer.requests[0] and rows["verbose"]["completion"] in writer.requests[0]
    assert problem.domain.matches(problem.domain.extract(text), problem.answer)
    assert counts["rewritten"] == 1 and counts["wrong answers"] == 1
    both = load_problems([rows["verbose"], rows["verbose"] | {"teacher": "n", "completion": text}])
    encoded = encode_problem(both[0], student.processing_class, max_length=400)
    stats = observe(student, [encoded], leaves=False).stats
    old, new = stats.nll.split([len(r.ids) for r in encoded.rationales])
    assert float(new.mean()) < float(old.mean())


def test_wrong_rewrites_and_right_students_keep_the_original(
    writer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)
    (problem,) = load_problems(rows_of("good", "verbose", problems=1))
    answers = ["The answer is 99"]
    monkeypatch.setattr(
        orion, "generate_in_room", lambda m, t, p, *_, **__: [t(answers[0])["input_ids"]] * len(p)
    )
    writer.texts = ["The answer is 98", f"Well. The answer is {problem.answer}"]
    texts, counts = rewritten(problem, student)
    assert texts == [None, writer.texts[1]]
    assert counts["rewritten"] == 1 and counts["rewritten but wrong"] == 1
    writer.texts = []
    with pytest.raises(ValueError, match="must return a text for each of 2 requests, got 0"):
        rewritten(problem, student)
    answers[0] = f"The answer is {problem.answer}"
    writer.requests.clear()
    texts, _ = rewritten(problem, student)
    assert texts == [None, None] and not writer.requests


def test_the_student_writes(tmp_path: Path) -> None:
    """An untrained student rewrites nothing that is right, so this is plain training."""
    options = {"samples": 1, "max_new_tokens": 3}
    settings: dict[str, Any] = {"strategy": "orion", "strategy_options": options}
    rows = rows_of(*TEACHERS, problems=2)
    ours, plain = train(tmp_path / "a", rows, **settings), train(tmp_path / "b", rows)
    assert torch.equal(ours[1], plain[1])
    log = json.loads((tmp_path / "a/trainer_state.json").read_text())["log_history"]
    assert log[0]["strategy/rewritten but wrong"] == 6


def test_resumes(tmp_path: Path) -> None:
    options = {"samples": 1, "max_new_tokens": 3}
    assert_resumes(tmp_path, strategy="orion", strategy_options=options)


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"samples": 2.5},
        {"temperature": -0.8},
        {"max_new_tokens": 0},
        {"writer": "me"},
        {"writer": "no.such:one"},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must be .*got"):
        Orion(**options)
