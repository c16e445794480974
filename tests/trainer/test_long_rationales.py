"""Problems of tens of thousands of tokens: memory, rows, leaves."""

from __future__ import annotations

import ctypes
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import peak_mb
from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import lazily
from compact.passes.encode import encode_problem
from compact.passes.packing import build_batch, tree_length
from compact.trainer import CompactTrainer
from compact.trainer.runlog import read_scores
from helpers import trajectories

TOKENIZER = build_tokenizer()


def long_rows(problems: int, *lengths: int) -> list[dict[str, str]]:
    """Rows of a zoo whose rationales have about `lengths` tokens, one teacher each."""
    rng = random.Random(0)
    rows = []
    for p in range(problems):
        story = zoo.make_story(rng)
        for k, length in enumerate(lengths):
            text, tokens = "", 0
            while tokens < length - 8:  # the answer and the end of the turn follow
                steps = zoo.TEACHERS["good"](zoo.make_story(rng), rng).split("\n")[:-1]
                text += ", ".join(step.rstrip(".") for step in steps) + ".\n"
                tokens = len(TOKENIZER(text)["input_ids"])
            row = {"question_id": f"q{p}", "prompt": story.question, "teacher": f"t{k}"}
            answer = str(story.answer)
            rows.append(row | {"completion": f"{text}The answer is {answer}", "answer": answer})
    return rows


def trainer_of(folder: Path, rows: list[dict[str, str]], **settings: Any) -> CompactTrainer:
    values: dict[str, Any] = {"preset": "robust", "max_length": 16384, "max_steps": 1, "seed": 42}
    values["per_device_train_batch_size"] = 1
    return trajectories.trainer_of(folder, rows, size={"hidden": 32}, **values | settings)


@pytest.mark.slow
def test_memory_is_linear_in_the_length(tmp_path: Path) -> None:
    """One problem of 4 rationales, 2k to 8k tokens each, with checkpointing and answer leaves."""
    # M_MMAP_THRESHOLD: blocks of over 1 MB go back when they are freed. By default malloc begins to
    # keep them once the first is freed, and the peak has the holes between them.
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)
    trainer_of(tmp_path / "warm", long_rows(1, 256, 256), gradient_checkpointing=True).train()
    peaks = []
    for length in (2048, 4096, 8192):
        rows = long_rows(1, *[length] * 4)
        trainer = trainer_of(tmp_path / str(length), rows, gradient_checkpointing=True)
        peaks.append(peak_mb(trainer.train, torch.device("cpu")))
        (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert 0 < loss < 10
    assert all(b <= 2.2 * a for a, b in pairwise(peaks)), peaks


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_several_rows_train_as_one(tmp_path: Path, preset: str) -> None:
    """Losses, scores, weights and parameters of two steps; two problems a micro-batch."""
    rows = long_rows(4, 90, 140, 60, 110)
    settings = {"preset": preset, "max_length": 256, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "seed": 3}
    found = []
    for name, limit in (("one", None), ("several", 280)):
        trainer = trainer_of(tmp_path / name, rows, **settings, max_row_length=limit)
        batch = trainer._loss.build(trainer.train_dataset.problems[:2], leaves=True)
        tokens = batch.main.attention_mask.sum(dim=1)
        assert len(tokens) == (2 if limit is None else 4)
        assert limit is None or int(tokens.max()) <= limit
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        found.append((losses, parameters, read_scores(tmp_path / name).to_pylist()))
    (losses, parameters, scores), (own_losses, own_parameters, own_scores) = found
    assert [float(x) for x in own_losses] == pytest.approx([float(x) for x in losses], rel=1e-5)
    torch.testing.assert_close(own_parameters, parameters, rtol=1e-4, atol=1e-5)
    assert len(scores) == len(own_scores) == 16
    for want, got in zip(scores, own_scores, strict=True):
        for column, value in want.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-3, abs=1e-4)
            assert got[column] == value, column


def test_a_row_must_hold_a_rationale(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_row_length must be at least max_length = 512.* got"):
        CompactConfig(output_dir=str(tmp_path), max_length=512, max_row_length=511)


def test_the_leaf_budget_holds_for_long_rationales() -> None:
    """Lengths as unequal as traces of reasoning models; in the problem and in each of its rows."""
    (problem,) = load_problems(long_rows(1, 6000, 1500, 3000, 400))
    for budget in (0.25, 0.1, 0.02):
        encoded = encode_problem(problem, TOKENIZER, max_length=8192, leaf_budget=budget)
        steps = sum(len(r.steps) for r in encoded.rationales)
        asked = [len(r.asked_steps) for r in encoded.rationales]
        assert min(asked) >= 1 and sum(asked) < steps
        assert asked[0] >= asked[2] >= asked[1] >= asked[3]
        for limit in (None, 8192):
            batch = build_batch(
                [encoded], layout="tree", leaves=True, pad_token_id=0, row_limit=limit
            )
            assert batch.leaves is not None
            main, leaf = (b.attention_mask.sum(dim=1) for b in (batch.main, batch.leaves))
            assert len(main) == (1 if limit is None else 2)
            assert int(leaf.sum()) <= budget * tree_length(encoded)
            assert bool((leaf <= 1.1 * budget * main).all()), (leaf, main)


def test_a_bad_problem_of_large_data_is_named_when_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a sample is checked at the start; the others when a step needs them."""
    monkeypatch.setattr(lazily, "AT_ONCE", 2)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    rows = long_rows(4, 40, 40)
    rows[4]["completion"] += " <new>"  # of q2; the sample is q1 and q3
    trainer = CompactTrainer(
        build_model(TOKENIZER, seed=0, layers=1, hidden=32),
        CompactConfig(
            output_dir=str(tmp_path),
            max_length=256,
            use_cpu=True,
            report_to="none",
            train_sampling_strategy="sequential",
            gradient_accumulation_steps=1,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert [p.question_id for p in trainer.train_dataset.problems.sample] == ["q1", "q3"]
    with pytest.raises(ValueError, match="question_id 'q2': the tokenizer gives id .* rows"):
        trainer.train()
    assert trainer.state.global_step == 2
