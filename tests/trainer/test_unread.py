"""Rationales whose weight is 0 whatever the student says are not read; nothing else changes."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compact import load_problems, read_scores
from compact.lab import zoo
from compact.lab.zoo_student import build_tokenizer
from compact.passes import Pass, lazily
from compact.passes.lazily import LazyProblems
from compact.strategies import Strategy, register_strategy
from compact.trainer import CompactTrainer, setup
from compact.weighting import Weights, make_weigher, skip_beyond
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


@pytest.mark.parametrize("preset", ["robust", "rejection", "uniform"])
def test_at_most_so_many_of_a_problem_are_read(tmp_path: Path, preset: str) -> None:
    """Right ones if the preset tells them from wrong ones; the rest is logged without weight."""
    run = trainer(tmp_path, preset=preset, max_rationales_per_problem=1, max_steps=6)
    run.train()
    read: dict[str, set[str]] = {}
    for (_, question, teacher), row in logged(tmp_path).items():
        assert (row["weight"] == 1.0) is (row["nll"] is not None)
        assert row["weight"] in (0.0, 1.0)
        if row["weight"]:
            read.setdefault(question, set()).add(teacher)
    assert all(len(teachers) == 1 for teachers in read.values())  # the same in each epoch
    found = set().union(*read.values())
    assert found == ({*TEACHERS} if preset == "uniform" else {"good", "verbose"})


def test_which_are_kept() -> None:
    """The most valid ones; equals by the seed, whatever the order of the teachers."""

    def problem(validity: dict[str, float | None]) -> Any:
        return SimpleNamespace(
            question_id="q",
            rationales=[
                SimpleNamespace(
                    teacher=t, judgement=v if v is None else SimpleNamespace(validity=v)
                )
                for t, v in validity.items()
            ],
        )

    def kept(most: int, seed: int, validity: dict[str, float | None], skips: Any = None) -> str:
        skipped = skip_beyond(most, seed, skips, problem(validity))
        return "".join(sorted(t for t, skip in zip(validity, skipped, strict=True) if not skip))

    graded = {"a": 0.2, "b": 0.9, "c": 0.5}
    assert [kept(most, 0, graded) for most in (1, 2, 3, 4)] == ["b", "bc", "abc", "abc"]
    assert kept(2, 0, graded, lambda _: [False, True, False]) == "ac"
    assert kept(1, 0, graded, lambda _: [True] * 3) == ""
    for equal in ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": None, "b": None, "c": None}):
        draws = [kept(1, seed, equal) for seed in range(30)]
        assert draws == [kept(1, seed, dict(reversed(equal.items()))) for seed in range(30)]
        assert set(draws) == {"a", "b", "c"}


def test_a_strategy_that_may_read_any_rationale_refuses_it(tmp_path: Path) -> None:
    message = "max_rationales_per_problem must be None with strategy crsd, .* got 2"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, strategy="crsd", max_rationales_per_problem=2)
    message = "max_rationales_per_problem must be a whole number of at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_rationales_per_problem=0)


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
    problems = LazyProblems(load_problems(ROWS), build_tokenizer(), max_length=600)
    own = [list(skips(problem)) for problem in problems.sample]
    copy = pickle.loads(pickle.dumps(skips))
    assert [list(copy(problem)) for problem in problems.sample] == own
    assert any(any(each) for each in own)


@pytest.mark.parametrize("preset", ["uniform", "random", "paper", "released", "persyn", "rsr-min"])
def test_weights_that_the_student_decides_skip_nothing(preset: str) -> None:
    assert make_weigher(preset).skips is None
