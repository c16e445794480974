"""CRSD: what rationales do for answers that are given without one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problem, plain_rationale
from compact.passes.forward import observe, run_pass
from compact.passes.packing import build_batch
from compact.passes.segments import segment_mean
from compact.strategies.crsd import Crsd
from compact.student import Student
from helpers.trajectories import train

LABEL_ONLY = {"kl": 0.0, "nce": 0.0, "label": 1.0, "rationales": 0.0}
# The terms kl and nce do not help here (docs/strategies.md), so what is tested are the others.
WITH_RATIONALES = {"kl": 0.0, "nce": 0.0, "label": 1.0, "rationales": 1.0}
_tokenizer = cache(build_tokenizer)
_TRAINED, _STEPS = 80, 150


def _problems(*, shuffled: bool) -> tuple[list[EncodedProblem], list[EncodedProblem]]:
    """Questions to train on, and others, of two signs each.

    A sign has a hidden class, 0 to 3; the answer is the sum of both classes modulo 4, and the
    rationale names them. Shuffled rationales are those of other questions, before the own answer.
    """
    rng = Random(0)
    first, second = ([i % 4 for i in range(12)] for _ in "ab")
    pairs = [(i, j) for i in range(12) for j in range(12)]
    for each in (first, second, pairs):
        rng.shuffle(each)
    hidden = [(first[i], second[j]) for i, j in pairs]
    named = hidden[:_TRAINED]
    if shuffled:
        Random(1).shuffle(named)
    named += hidden[_TRAINED:]
    rows = [
        {
            "question_id": f"{n:03d}",
            "teacher": "t",
            "prompt": f"{40 + i} {20 + j}",
            "completion": f"40 {60 + u} 40 {70 + v}\nThe answer is {(a + b) % 4}",
            "answer": str((a + b) % 4),
        }
        for n, ((i, j), (u, v), (a, b)) in enumerate(zip(pairs, named, hidden, strict=True))
    ]
    found = [encode_problem(p, _tokenizer(), max_length=40) for p in load_problems(rows)]
    return found[:_TRAINED], found[_TRAINED:]


def _right_without_rationale(options: dict[str, float], *, shuffled: bool) -> float:
    """Trains a student; the share of new questions that it answers rightly at once."""
    model = build_model(_tokenizer(), 0, hidden=32, layers=2)
    student = Student.of(model, _tokenizer())
    trained, new = _problems(shuffled=shuffled)
    batch = build_batch(trained, layout="padded", leaves=False, pad_token_id=student.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / (2 * _STEPS))
    )
    strategy, weight = Crsd(**options), torch.ones(len(trained))
    for _ in range(_STEPS):
        optimizer.zero_grad()
        live, hidden, pass_ = run_pass(student, batch)
        own = (weight * segment_mean(live.nll, batch.token_offsets)).sum()
        loss = strategy.nll_factor * own + strategy.term(hidden, pass_, weight)
        (loss / len(trained)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    asked = [
        replace(
            p, rationales=(plain_rationale("t", p.rationales[0].ids[p.rationales[0].marker :], ""),)
        )
        for p in new
    ]
    model.eval()
    pass_ = observe(student, asked, layout="padded", leaves=False)
    at = pass_.batch.token_offsets[:-1] + 3  # "The", " answer", " is", the answer
    logits = student.logits(pass_.hidden.flatten(0, 1)[pass_.batch.rows][at])
    return float((logits.argmax(1) == pass_.batch.target[at]).float().mean())


def _rows(completion: str) -> list[dict[str, str]]:
    sums = [(2 + i, i) for i in range(4)]
    return [
        {
            "question_id": f"q{i}",
            "prompt": f"{a} + {b}",
            "teacher": "t",
            "completion": completion.format(a=a, b=b, sum=a + b),
            "answer": str(a + b),
        }
        for i, (a, b) in enumerate(sums)
    ]


def test_right_rationales_without_an_answer_marker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are right, but it is not known which of their tokens are the answer."""
    without = _rows("{a} + {b} = {sum} beads are left.")
    with pytest.raises(ValueError, match="must have an answer marker.*got none among 4 right"):
        train(tmp_path / "none", without, strategy="crsd")
    wrong = _rows("{a} + {b} = 99.\nThe answer is 99")
    with pytest.raises(ValueError, match="must have an answer marker.*got none among 0 right"):
        train(tmp_path / "wrong", wrong, strategy="crsd")
    some = without[:1] + _rows("{a} + {b} = {sum}.\nThe answer is {sum}")[1:]
    train(tmp_path / "some", some, strategy="crsd", max_steps=1)
    assert "crsd: 1 of 4 right rationales lack an answer marker" in caplog.text


@pytest.mark.parametrize("options", [{"kl": "1"}, {"nce": -1}, {"temperature": 0}])
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of crsd must be .* got"):
        Crsd(**options)


@pytest.mark.slow
def test_rationales_improve_answers_without_one() -> None:
    """Over training on the answers alone; rationales of other questions do not."""
    label_only = _right_without_rationale(LABEL_ONLY, shuffled=False)
    ours = _right_without_rationale(WITH_RATIONALES, shuffled=False)
    other = _right_without_rationale(WITH_RATIONALES, shuffled=True)
    assert ours > label_only + 0.2 and ours > other + 0.2, (label_only, ours, other)
    assert other < 0.35, other  # a quarter by chance
