"""Co-supervised learning: experts get their questions, the filter keeps what the student can do."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compact.data import Problem, load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import lazily
from compact.report.run import visits
from compact.strategies import co_supervised
from compact.strategies.co_supervised import CoSupervised
from compact.student import Student
from compact.trainer.runlog import SCHEMA, read_scores
from helpers.resuming import assert_resumes
from helpers.trajectories import TEACHERS, rows_of, train


def _trained_on_good() -> Student:
    """A student that has seen 60 steps of the wording of the teacher `good`."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0, hidden=32, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [row["completion"] for row in rows_of("good", problems=24)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=encoded.input_ids, labels=labels).loss.backward()
        optimizer.step()
    return Student.of(model.eval(), tokenizer)


def _experts(problems: int = 24) -> tuple[list[Problem], list[str]]:
    """On even questions `a` writes in the student's wording and `b` does not; odd: the reverse."""
    found, experts = [], []
    rows = rows_of("good", "style-shifted", problems=problems)
    for i, problem in enumerate(load_problems(rows)):
        mine, other = problem.rationales
        names = ("a", "b") if i % 2 == 0 else ("b", "a")
        pair = (replace(mine, teacher=names[0]), replace(other, teacher=names[1]))
        found.append(replace(problem, rationales=tuple(sorted(pair, key=lambda r: r.teacher))))
        experts.append(names[0])
    return found, experts


def test_planted_experts_get_their_questions() -> None:
    student = _trained_on_good()
    problems, experts = _experts()
    strategy = CoSupervised(samples=1, probe=4, max_new_tokens=2)
    strategy.prepare(problems, student.model, student.processing_class)
    strategy.begin(student.model, 10)
    read = strategy.rollout(list(strategy._encoded), student)
    for problem in read:
        (rationale,) = problem.rationales
        assert rationale.teacher == strategy.assigned[problem.question_id]
    found = [strategy.assigned[p.question_id] for p in problems]
    right = sum(a == b for a, b in zip(found, experts, strict=True))
    assert right >= 0.9 * len(experts)
    assert strategy.take_log()["questions/a"] == pytest.approx(0.5, abs=0.1)


def test_the_filter_beats_the_base_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the questions have garbled texts; the student samples the assigned answer of half."""
    student = _trained_on_good()
    problems = load_problems(rows_of("good", problems=24))
    garbled = {p.question_id for p in problems[::2]}
    given = [
        replace(
            p,
            rationales=tuple(
                replace(r, completion=" ".join(str(r.completion).split()[::-1]))
                for r in p.rationales
            ),
        )
        if p.question_id in garbled
        else p
        for p in problems
    ]
    strategy = CoSupervised(samples=1, probe=24, max_new_tokens=2)
    monkeypatch.setattr(strategy, "_keep_rate", lambda _: 0.5)
    strategy.prepare(given, student.model, student.processing_class)
    strategy.begin(student.model, 10)
    read = strategy.rollout(list(strategy._encoded), student)
    sound = [q for q in strategy.kept if q not in garbled]
    assert len(strategy.kept) == 12 and len(sound) >= 10  # 6 by chance
    assert Counter(p.question_id for p in read) == Counter(dict.fromkeys(strategy.kept, 2))


def test_keep_rate_counts_sampled_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that always answers as the first problem's teacher does."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1).eval(), tokenizer)
    problems = load_problems(rows_of("good", problems=8))
    first = problems[0].answer
    text = tokenizer(f"The answer is {first}")["input_ids"]
    monkeypatch.setattr(
        co_supervised, "generate_in_room", lambda m, t, p, *_, **__: [text] * len(p)
    )
    strategy = CoSupervised(samples=2, probe=8, least=0.01)
    strategy.prepare(problems, student.model, tokenizer)
    strategy.begin(student.model, 10)
    strategy.rollout(list(strategy._encoded), student)
    want = sum(p.answer == first for p in problems) / 8
    assert strategy.take_log()["keep rate"] == want and len(strategy.kept) == round(8 * want)


def test_resumes(tmp_path: Path) -> None:
    options = {"rounds": 2, "samples": 1, "probe": 2, "max_new_tokens": 4, "least": 0.6}
    assert_resumes(tmp_path, strategy="co-supervised", strategy_options=options)


def test_kept_questions_take_the_places_of_the_others(tmp_path: Path) -> None:
    """One of two questions is kept in a round: an epoch reads each of them twice."""
    options = {"samples": 1, "max_new_tokens": 2, "least": 0.5, "rounds": 1}
    settings: dict[str, Any] = {"strategy": "co-supervised", "strategy_options": options}
    train(tmp_path, rows_of(*TEACHERS), **settings, max_steps=1)
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log[0]["strategy/keep rate"] == 0.5
    scores = read_scores(tmp_path)
    assert scores["weight"].to_pylist() == [1.0] * 4
    questions = scores["question_id"].to_pylist()
    assert sorted(map(questions.count, set(questions))) == [2, 2]
    starts = visits({name: np.array(scores[name].to_pylist()) for name in SCHEMA.names})
    assert len(starts) == 5  # also where one question has two places in a row


def test_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset must be uniform with strategy co-supervised"):
        train(tmp_path, rows_of(*TEACHERS), strategy="co-supervised", preset="robust")


def test_large_data_are_encoded_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1).eval(), tokenizer)
    problems = load_problems(rows_of(*TEACHERS, problems=8))
    monkeypatch.setattr("compact.passes.lazily.AT_ONCE", 2)
    encoded: list[str] = []
    encode = lazily.encode_problem
    monkeypatch.setattr(
        lazily,
        "encode_problem",
        lambda p, *_, **options: (encoded.append(p.question_id), encode(p, *_, **options))[1],
    )
    strategy = CoSupervised(samples=1, probe=2, max_new_tokens=2)
    strategy.prepare(problems, student.model, tokenizer)
    assert len(encoded) == 2
    strategy.begin(student.model, 10)
    strategy.rollout(strategy._encoded[:1], student)
    assert strategy.assigned.keys() == {p.question_id for p in problems}


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0},
        {"samples": 0},
        {"probe": 0},
        {"least": 0},
        {"temperature": -1},
        {"max_new_tokens": 0},
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of co-supervised must be .*got"):
        CoSupervised(**options)
