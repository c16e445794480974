"""MoT: a soup of one round, identical teachers, LoRA products, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from compact.strategies.mot import MergeOfThoughts, truncated
from helpers.resuming import assert_resumes
from helpers.trajectories import TEACHERS, rows_of, train, trainer_of

MOT = {"strategy": "mot", "strategy_options": {"rounds": 1}}
BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1}
BEST |= {"eval_strategy": "steps", "save_strategy": "steps"}


def test_one_round_is_a_one_shot_soup(tmp_path: Path) -> None:
    """R = 1: the mean of K students, each trained alone from the same start and problems."""
    rows = rows_of(*TEACHERS)
    batch = {"per_device_train_batch_size": 2}
    names = [row["teacher"] for row in rows[:3]]
    alone = [
        train(tmp_path / name, rows, preset=f"single:{name}", max_steps=2, **batch)[1]
        for name in names
    ]
    ours = train(tmp_path / "mot", rows, max_steps=6, **batch, **MOT)[1]
    torch.testing.assert_close(ours, torch.stack(alone).mean(0), rtol=0, atol=2e-6)
    assert not torch.allclose(ours, alone[0], atol=1e-4)


def test_identical_teachers_are_plain_sft(tmp_path: Path) -> None:
    """Every branch takes the same steps, so their mean is each of them."""
    ours = train(tmp_path / "a", rows_of("good", "good", "good"), max_steps=6, **MOT)[1]
    plain = train(tmp_path / "b", rows_of("good"), max_steps=2)[1]
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)


SCHEDULES: list[dict[str, Any]] = [
    {"lr_scheduler_type": "linear"},
    {"lr_scheduler_type": "cosine", "warmup_steps": 4},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_branch_has_the_same_rates(tmp_path: Path, schedule: dict[str, Any]) -> None:
    """So the order of the teachers does not change what the branches are merged to."""
    rows = rows_of("good", "wrong-step")
    swapped = [row for pair in zip(rows[1::2], rows[::2], strict=True) for row in pair]
    settings = {"max_steps": 8, "learning_rate": 1e-2} | MOT | schedule
    one, other = (train(tmp_path / n, r, **settings)[1] for n, r in (("a", rows), ("b", swapped)))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_identical_teachers_are_plain_sft_with_a_schedule(tmp_path: Path) -> None:
    """Also over two rounds: the rates fall as in one run, not anew in each round."""
    settings: dict[str, Any] = {"lr_scheduler_type": "linear"}
    settings |= {"adam_beta1": 0.0, "adam_beta2": 0.0}  # the optimizer starts anew in each branch
    mot = MOT | {"strategy_options": {"rounds": 2}}
    rows = rows_of("good", "good")
    ours = train(tmp_path / "a", rows, max_steps=8, **settings, **mot)[1]
    plain = train(tmp_path / "b", rows_of("good"), max_steps=4, **settings)[1]
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)


def test_a_schedule_that_is_not_known_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(
        tmp_path, rows_of("good", "verbose"), max_steps=4, lr_scheduler_type="linear", **MOT
    )
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-3)
    own = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer.optimizer, trainer.lr_scheduler = optimizer, own
    trainer.train()
    told = [r.getMessage() for r in caplog.records if r.name == "compact.strategies.mot"]
    assert len(told) == 1 and "not that of lr_scheduler_type" in told[0]


@pytest.mark.parametrize("skipped", [{1}, {2, 3}, {6}])
def test_a_step_that_the_loss_scaler_skips_leaves_the_rates_equal(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    skipped: set[int],
) -> None:
    """As with fp16: the optimizer takes no step, and transformers does not move the schedule."""
    plain, calls = AcceleratedOptimizer.step, []

    def step(self: Any, closure: Any = None) -> None:
        calls.append(None)
        self._is_overflow = len(calls) in skipped
        if not self._is_overflow:
            plain(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    rows = rows_of("good", "verbose")
    settings: dict[str, Any] = {"max_steps": 8, "lr_scheduler_type": "linear"} | MOT
    settings |= {"save_strategy": "steps", "save_steps": 4}
    want = [1e-3 * factor for factor in (0.75, 0.5, 0.25, 1.0, 0.75, 0.5, 0.25)]  # of the next step
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        trainer = trainer_of(tmp_path, rows, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        log = [e.get("strategy/learning rate") for e in trainer.state.log_history if "loss" in e]
        assert log[:7] == pytest.approx(want)
    assert not [r for r in caplog.records if r.name == "compact.strategies.mot"]


@pytest.mark.parametrize("rank", [3, 12, 20])
def test_lora_products_equal_the_dense_mean(rank: int) -> None:
    """Against the SVD of the dense mean of four products; at full rank the mean itself."""
    g = torch.Generator().manual_seed(0)
    branches = [(torch.randn(3, 20, generator=g), torch.randn(30, 3, generator=g)) for _ in "abcd"]
    dense = sum(b @ a for a, b in branches) / 4
    a = torch.cat([a for a, _ in branches])
    b = torch.cat([b / 4 for _, b in branches], dim=1)
    new_a, new_b, lost = truncated(a, b, rank)
    assert new_a.shape == (rank, 20) and new_b.shape == (30, rank)
    u, s, vh = torch.linalg.svd(dense.double())
    kept = min(rank, len(s))
    best = ((u[:, :kept] * s[:kept]) @ vh[:kept]).float()
    torch.testing.assert_close(new_b @ new_a, best, rtol=0, atol=1e-5)
    want = float(s[kept:].square().sum() / s.square().sum())
    assert lost == pytest.approx(want, abs=1e-6)
    if rank >= 12:
        torch.testing.assert_close(new_b @ new_a, dense, rtol=0, atol=1e-5)


def test_branches_train_on_the_same_steps() -> None:
    """Seven steps, two rounds of two branches: 1, 2, 2, 2 steps, each round on its own problems."""
    strategy = MergeOfThoughts(rounds=2)
    strategy.teachers = ["a", "b"]
    strategy.begin(torch.nn.Linear(1, 1), 7)
    assert [strategy.data_step(i) for i in range(7)] == [0, 0, 1, 2, 3, 2, 3]


def test_weights_of_the_preset_weigh_the_branches(tmp_path: Path) -> None:
    """`merge: weights` differs from the plain mean, and gives the same with uniform weights."""
    rows = rows_of(*TEACHERS)
    options = {"strategy": "mot", "strategy_options": {"rounds": 1, "merge": "weights"}}
    mean = train(tmp_path / "a", rows, max_steps=6, **MOT)[1]
    even = train(tmp_path / "b", rows, max_steps=6, **options)[1]
    torch.testing.assert_close(even, mean, rtol=0, atol=2e-5)
    robust = train(tmp_path / "c", rows, max_steps=6, **options | {"preset": "softmax-nll"})[1]
    assert not torch.allclose(robust, mean, atol=1e-5)


def test_problems_that_are_left_out_have_no_say(tmp_path: Path) -> None:
    """Two of four problems have no right rationale; in the others one teacher is right."""
    rows = []
    for i in range(4):
        gold, right = 2 * i + 2, i < 2
        for teacher in "ab":
            answer = gold if right and teacher == "a" else gold + 1 + (teacher == "b")
            rows.append(
                {
                    "question_id": f"q{i}",
                    "prompt": f"Ann has {i + 2} beads and gets {i}. How many?",
                    "teacher": teacher,
                    "completion": f"She has {answer} beads.\nThe answer is {answer}",
                    "answer": str(gold),
                }
            )
    options = {"strategy": "mot", "strategy_options": {"rounds": 1, "merge": "weights"}}
    trainer = trainer_of(tmp_path, rows, preset="robust", **options)
    trainer.train()
    log = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    assert log["strategy/branch weight/a"] == 1.0 and log["strategy/branch weight/b"] == 0.0


@pytest.mark.parametrize(
    "settings",
    [{}, {"stop": 2}, {"preset": "softmax-nll"}, {"lr_scheduler_type": "cosine"}],
)
def test_resumes_within_a_round(tmp_path: Path, settings: dict[str, object]) -> None:
    """From a checkpoint in the middle of the first round, and from one within a branch."""
    merge = "weights" if "preset" in settings else "mean"
    options = {"strategy": "mot", "strategy_options": {"rounds": 2, "merge": merge}}
    assert_resumes(tmp_path, steps=12, **{"stop": 5} | options | settings)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"preset": "robust"}, "preset must be uniform with strategy mot, got 'robust'"),
        ({"preset": "single:good-0"}, "preset must not be single:good-0 with strategy mot"),
        (BEST, "load_best_model_at_end must not be True with strategy mot, because between two"),
        (
            BEST | {"load_best_model_at_end": False, "save_strategy": "best"},
            "save_strategy must not be best with strategy mot, because between two merges",
        ),
        ({"max_steps": 2}, "max_steps must be at least 3 for 1 rounds of 3 branches, got 2"),
        ({"strategy_options": {"rounds": 0}}, "rounds of mot must be a whole number .* got 0"),
        ({"strategy_options": {"rounds": True}}, "rounds of mot must be .* got True"),
        ({"strategy_options": {"merge": "sum"}}, "merge of mot must be mean or weights"),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, "must divide"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(tmp_path, rows_of(*TEACHERS), **{"max_steps": 6} | MOT | settings)
