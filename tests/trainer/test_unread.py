"""Rationales whose weight is 0 whatever the student says are not read; nothing else changes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compact import read_scores
from compact.lab import zoo
from compact.passes import Pass, lazily
from compact.strategies import Strategy, register_strategy
from compact.trainer import CompactTrainer, setup
from compact.weighting import Weights, make_weigher
from helpers.trajectories import trainer_of

TEACHERS = ("good", "verbose", "wrong-step")
ROWS = zoo.make_rows(TEACHERS, 6, seed=3)
SKIPPING: dict[str, dict[str, Any]] = {
    "robust": {"adaptability": "none"},  # epiphanies stand out among what was read
    "rejection": {},
    "answer-vote": {},
    "oracle": {"teachers": ["good", "verbose"]},
    "longest": {},
    "shortest": {},
}


def trainer(folder: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> CompactTrainer:
    own = {"preset": "robust", "max_steps": 3, "max_length": 600, "learning_rate": 1e-2}
    own |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    return trainer_of(folder, rows, **own | settings)


def logged(folder: Path) -> dict[tuple[int, str, str], dict[str, Any]]:
    rows = read_scores(folder).to_pylist()
    return {(row["step"], row["question_id"], row["teacher"]): row for row in rows}


@pytest.mark.parametrize("preset", SKIPPING)
def test_what_is_not_read_changes_no_weight_and_no_training(
    tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"preset": preset, "overrides": SKIPPING[preset]}
    few = trainer(tmp_path / "few", **settings)
    few.train()
    monkeypatch.setattr(setup, "skips_of", lambda *_: None)
    all_ = trainer(tmp_path / "all", **settings)
    all_.train()
    ours, theirs = logged(tmp_path / "few"), logged(tmp_path / "all")
    assert ours.keys() == theirs.keys()
    unread = {key for key, row in ours.items() if row["nll"] is None}
    assert 0 < len(unread) < len(ours)
    for key, row in theirs.items():
        assert ours[key]["weight"] == pytest.approx(row["weight"], abs=1e-5)
        assert ours[key]["tokens"] == row["tokens"]
        assert key not in unread or row["weight"] == 0.0
    for name, value in few.model.state_dict().items():
        torch.testing.assert_close(value, all_.model.state_dict()[name], atol=2e-5, rtol=1e-4)


def test_the_log_has_the_validity_of_what_is_not_read(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    wrong = [row for row in logged(tmp_path).values() if row["teacher"] == "wrong-step"]
    assert wrong
    assert all(row["validity"] == 0.0 and row["adaptability"] is None for row in wrong)


def all_wrong() -> tuple[str, list[dict[str, Any]]]:
    """A question of which every rationale is wrong, and the rows with it."""
    first = ROWS[0]["question_id"]
    rows = [r for r in ROWS if r["question_id"] != first or r["teacher"] == "wrong-step"]
    longer = {**rows[0], "teacher": "other", "completion": f"Well. {rows[0]['completion']}"}
    return first, [*rows, longer]


@pytest.mark.parametrize("preset", ["robust", "rejection"])
def test_a_problem_without_a_right_rationale_is_left_out(tmp_path: Path, preset: str) -> None:
    question, rows = all_wrong()
    run = trainer(tmp_path, rows, preset=preset, max_steps=4)
    assert len(run.train_dataset) == 5
    run.train()
    assert question not in {q for _, q, _ in logged(tmp_path)}


@pytest.mark.parametrize("preset", ["robust", "rejection"])
def test_of_data_encoded_on_the_way_it_keeps_the_shortest_without_weight(
    tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazily, "AT_ONCE", 3)
    question, rows = all_wrong()
    run = trainer(tmp_path, rows, preset=preset, max_steps=4)
    problems = [run.train_dataset[i].problem for i in range(6)]
    (problem,) = (p for p in problems if p.question_id == question)
    assert [r.teacher for r in problem.rationales] == ["wrong-step"]
    assert [r.teacher for r in problem.unread] == ["other"]
    assert all(len(p.unread) == 1 for p in problems)
    run.train()
    mine = [row for (_, q, _), row in logged(tmp_path).items() if q == question]
    assert mine and all(row["weight"] == 0.0 for row in mine)


def test_leaves_are_chosen_for_what_is_read(tmp_path: Path) -> None:
    """As if the data did not have the others."""
    rows = [
        {**r, "completion": r["completion"] * 9} if r["teacher"] == "verbose" else r for r in ROWS
    ]
    without = [row for row in rows if row["teacher"] == "good"]
    few, alone = (
        trainer(tmp_path / str(n), some, preset="oracle", overrides={"teachers": ["good"]})
        for n, some in enumerate((rows, without))
    )
    for i in range(len(alone.train_dataset)):
        ours, theirs = (run.train_dataset[i].problem.rationales for run in (few, alone))
        assert [r.leaf_steps for r in ours] == [r.leaf_steps for r in theirs]


def test_skips_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    data = trainer(tmp_path).train_dataset
    data._skips = lambda problem: [True]
    with pytest.raises(ValueError, match=r"skips must return 3 values, .* 'zoo.*', got 1"):
        data[0]


@pytest.mark.usefixtures("own_registries")
def test_a_strategy_with_a_say_in_the_loss_reads_all(tmp_path: Path) -> None:
    @register_strategy("looking")
    class Looking(Strategy):
        def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
            return weights.weight

    run = trainer(tmp_path, strategy="looking")
    assert all(not run.train_dataset[i].problem.unread for i in range(len(run.train_dataset)))


@pytest.mark.parametrize("preset", SKIPPING)
def test_workers_of_the_loader_can_be_told(preset: str) -> None:
    skips = make_weigher(preset, **SKIPPING[preset]).skips
    assert skips is not None
    assert pickle.loads(pickle.dumps(skips)) is not None


@pytest.mark.parametrize("preset", ["uniform", "random", "paper", "released", "persyn", "rsr-min"])
def test_weights_that_the_student_decides_skip_nothing(preset: str) -> None:
    assert make_weigher(preset).skips is None
