"""Answer confidence: the confidences against full logits, the weights, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.strategies.answer_confidence import AnswerConfidence, confidences
from compact.student import Student
from compact.trainer.runlog import read_scores
from helpers.resuming import assert_resumes
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, rows_of, train

NAMES = [row["teacher"] for row in rows_of(*TEACHERS, problems=1)]


_QUESTIONS = sorted({row["question_id"] for row in rows_of(*TEACHERS)})
_KINDS = ("surely", "evenly", "surely", "evenly")
_PLANTED = {
    q: (0.9, 0.1, 0.1) if kind == "surely" else (0.9, 0.9, 0.1)
    for q, kind in zip(_QUESTIONS, _KINDS, strict=True)
}


def test_against_full_logits() -> None:
    """Two models, one rationale without an answer."""
    tokenizer = build_tokenizer()
    rows = rows_of(*TEACHERS, problems=1)
    rows[2] = rows[2] | {"completion": "I do not know."}
    (problem,) = (encode_problem(p, tokenizer, max_length=400) for p in load_problems(rows))
    students = [
        Student.of(build_model(tokenizer, seed, hidden=16, layers=1).eval(), tokenizer)
        for seed in (0, 1)
    ]
    models = dict(zip(NAMES, (students[0], students[1], students[0]), strict=True))
    found = confidences(problem, models)
    for rationale in problem.rationales[:2]:
        ids = torch.tensor([[*problem.prompt_ids, *rationale.ids]])
        logp = models[rationale.teacher].model(input_ids=ids).logits[0, :-1].log_softmax(1)
        own = logp.gather(1, ids[0, 1:, None])[len(problem.prompt_ids) + rationale.marker - 1 :]
        assert found[rationale.teacher] == pytest.approx(float(own.mean().exp()), rel=1e-4)
    assert found[NAMES[2]] == 0.0


@pytest.mark.parametrize("margin", [False, True])
def test_the_weights_of_a_run(
    tmp_path: Path, margin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """softmax(c / tau) of planted confidences; a question without a margin counts nothing."""
    table = {f: dict(zip(NAMES, c, strict=True)) for f, c in _PLANTED.items()}
    monkeypatch.setattr(
        "compact.strategies.answer_confidence.confidences", lambda p, _: table[p.question_id]
    )
    save_student(tmp_path / "teacher")
    options = {"teachers": str(tmp_path / "teacher"), "margin": margin}
    settings: dict[str, Any] = {"strategy": "answer-confidence", "strategy_options": options}
    train(tmp_path / "run", rows_of(*TEACHERS), **settings, max_steps=1)
    scores = read_scores(tmp_path / "run")
    columns = (scores[name].to_pylist() for name in ("question_id", "teacher", "weight"))
    margins = {"surely": 0.8, "evenly": 0.0}
    mean = sum(margins[kind] for kind in _KINDS) / 4
    for question, teacher, weight in zip(*columns, strict=True):
        c = torch.tensor([table[question][name] for name in NAMES])
        want = float((c / 0.2).softmax(0)[NAMES.index(teacher)])
        factor = margins[_KINDS[_QUESTIONS.index(question)]] / mean if margin else 1.0
        assert weight == pytest.approx(want * factor, abs=1e-5)
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert log[0][f"strategy/confidence/{NAMES[0]}"] == pytest.approx(0.9)


def test_confidences_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run has computed is read; of another teacher it is refused."""
    save_student(tmp_path / "teacher")
    tokenizer, problems = build_tokenizer(), load_problems(rows_of(*TEACHERS))
    asked: list[str] = []

    def counted(problem: Any, models: Any) -> dict[str, float]:
        if len(asked) == 3:
            raise RuntimeError("killed")
        asked.append(problem.question_id)
        return confidences(problem, models)

    monkeypatch.setattr("compact.strategies.answer_confidence.confidences", counted)

    def prepared() -> AnswerConfidence:
        strategy = AnswerConfidence(str(tmp_path / "teacher"), dtype="float32")
        strategy.folder, strategy.max_length = tmp_path / "run", 400
        strategy.prepare(problems, torch.nn.Identity(), tokenizer)
        return strategy

    with pytest.raises(RuntimeError, match="killed"):
        prepared()
    asked.clear()
    first, again = prepared(), prepared()
    assert asked == [problems[3].question_id]
    assert first.table == again.table and list(first.table) == [p.question_id for p in problems]
    assert first.mean_margin == again.mean_margin
    assert first.take_log() == again.take_log()
    model = build_model(tokenizer, 5, hidden=16, layers=1)
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="answer-confidence.jsonl: has rows from other settings"):
        prepared()


def test_resumes(tmp_path: Path) -> None:
    save_student(tmp_path / "teacher")
    options = {"teachers": str(tmp_path / "teacher"), "dtype": "float32"}
    assert_resumes(tmp_path / "runs", strategy="answer-confidence", strategy_options=options)


def test_rationales_without_an_answer_marker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without any answer there would be nothing but even weights."""
    save_student(tmp_path / "teacher")
    options = {"teachers": str(tmp_path / "teacher"), "dtype": "float32"}
    settings: dict[str, Any] = {"strategy": "answer-confidence", "strategy_options": options}
    rows = rows_of(*TEACHERS)
    rows[0] = rows[0] | {"completion": "I do not know."}
    train(tmp_path / "some", rows, **settings, max_steps=1)
    assert "answer-confidence: 1 of 12 rationales lack an answer marker" in caplog.text
    none = [row | {"completion": "I do not know."} for row in rows]
    with pytest.raises(ValueError, match="must have an answer marker, .* got none among 12"):
        train(tmp_path / "none", none, **settings)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="tau of answer-confidence must be a number above 0, got 0"
    ):
        AnswerConfidence("x", tau=0)
    with pytest.raises(ValueError, match="tau of answer-confidence must be .* got '.2'"):
        AnswerConfidence("x", tau=".2")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="teachers of answer-confidence must be a model, or .* got"
    ):
        AnswerConfidence({"a": 3})  # type: ignore[dict-item]
    settings = {"strategy": "answer-confidence", "strategy_options": {"teachers": "x"}}
    with pytest.raises(ValueError, match="preset must be uniform with strategy answer-confidence"):
        train(tmp_path, rows_of(*TEACHERS), **settings, preset="robust")
