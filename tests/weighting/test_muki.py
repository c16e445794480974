"""MUKI: specialists are found by their confidence, ambiguous questions weigh less."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.answers import find_domain
from compact.data import load_problems
from compact.lab.zoo_student import build_tokenizer
from compact.passes.encode import encode_problem
from compact.weighting import make_weigher
from compact.weighting.muki import confidence, read_confidences
from helpers.passes import pass_of
from helpers.toy import make_problem


def test_confidence() -> None:
    domain = find_domain("7")
    assert confidence(["7", "7 apples", "7.0"], domain) == pytest.approx(1.0)
    assert confidence(["1", "2", "3", "4"], domain) == pytest.approx(0.0)
    mixed = 1 + (0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert confidence(["7", "7", "7", "8"], domain) == pytest.approx(mixed)


@pytest.mark.parametrize(
    "gold, prompt, answers",
    [
        ("B", "Which?\n(A) sea\n(B) the field", ["(B)", "B", "B) the field", "the field"]),
        ("yes", "Is it so?", ["yes", "Yes, it is", "True", "yes"]),
    ],
)
def test_sampled_answers_are_compared_in_the_domain(
    tmp_path: Path, gold: str, prompt: str, answers: list[str]
) -> None:
    """All four say the same, so the teacher is sure."""
    row = {"question_id": "q0", "prompt": prompt, "teacher": "t0", "answer": gold}
    (given,) = load_problems([row | {"completion": f"So it is. The answer is {gold}"}])
    problem = encode_problem(given, build_tokenizer(), max_length=200)
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"question_id": "q0", "teacher": "t0", "answers": answers}))
    found = make_weigher("muki", confidences=str(path))(pass_of([problem])).scores
    assert found["confidence"].tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("override", [{"tau": 0}, {"tau": "x"}, {"margin": "yes"}])
def test_bad_settings(tmp_path: Path, override: dict[str, Any]) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("")
    name = next(iter(override))
    with pytest.raises(ValueError, match=f"override of muki: {name} must be .* got"):
        make_weigher("muki", confidences=str(path), **override)


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, list[int]]:
    """60 questions of three teachers; the specialist of a question answers 9 of 10 times alike."""
    rng = random.Random(0)
    rows, specialists = [], []
    for q in range(60):
        specialists.append(rng.randrange(3))
        for k in range(3):
            sure = 0.9 if k == specialists[-1] else 0.3
            answers = ["5" if rng.random() < sure else str(rng.randrange(9)) for _ in range(10)]
            rows.append({"question_id": f"q{q}", "teacher": f"t{k}", "answers": answers})
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, specialists


def test_planted_specialists_get_their_questions(planted: tuple[Path, list[int]]) -> None:
    path, specialists = planted
    pass_ = pass_of([make_problem(q, [4, 5, 6]) for q in range(60)])
    weight = make_weigher("muki", confidences=str(path))(pass_).weight.view(60, 3)
    torch.testing.assert_close(weight.sum(1), torch.ones(60))
    right = weight.argmax(1) == torch.tensor(specialists)
    assert float(right.float().mean()) > 0.9


def test_ambiguous_questions_weigh_less(tmp_path: Path) -> None:
    """A question on which two teachers are equally sure counts 0; the state is kept."""
    values = {("q0", "t0"): 0.9, ("q0", "t1"): 0.1, ("q1", "t0"): 0.7, ("q1", "t1"): 0.7}
    path = tmp_path / "c.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question_id": q, "teacher": t, "confidence": v}) + "\n"
            for (q, t), v in values.items()
        )
    )
    pass_ = pass_of([make_problem(q, [4, 5]) for q in range(2)])
    weigher = make_weigher("muki", confidences=str(path), margin=True)
    found = weigher(pass_)
    weigher.update(found.scores, pass_.batch.problem_offsets)
    again = make_weigher("muki", confidences=str(path), margin=True)
    again.load_state_dict(json.loads(json.dumps(weigher.state_dict())))
    total = again(pass_).weight.view(2, 2).sum(1)
    assert float(total[0]) == pytest.approx(2.0) and float(total[1]) == pytest.approx(0.0)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path, answer = tmp_path / "c.jsonl", "7\u2028apples\x85"
    row = {"question_id": "q", "teacher": "t", "answers": [answer, "7"]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n")
    assert read_confidences(path) == {("q", "t"): [answer, "7"]}


@pytest.mark.parametrize(
    "line, words",
    [
        ("[]", "c.jsonl:1: expected a JSON object"),
        ('{"question_id": "q0", "teacher": "t0"}', "c.jsonl:1: expected answers"),
        ('{"question_id": "q0", "teacher": "t0", "confidence": 2}', "confidence .0 to 1., got 2"),
        ('{"question_id": "q9", "teacher": "t0", "confidence": 1}', "found no line"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    problem = replace(make_problem(0, [4]), question_id="q0")
    with pytest.raises(ValueError, match=words):
        make_weigher("muki", confidences=str(path))(pass_of([problem]))
