"""The seams of the trainer: each hook is called where it says, and its state is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from compact.passes import EncodedProblem, Pass
from compact.passes.segments import segment_sum
from compact.strategies import LossTerm, Strategy, make_strategy, register_strategy
from compact.trainer.step import OpenStep
from compact.weighting import Weights
from compact.weighting.consistency import ConsistencyTerm
from helpers.trajectories import TEACHERS, rows_of, train, trainer_of


class Ridge:
    """A loss term: the squared size of the hidden states."""

    name: ClassVar[str] = "ridge"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        assert hidden.requires_grad == torch.is_grad_enabled() and not weight.requires_grad
        return self.factor * hidden.square().mean() * len(pass_.batch.problems)


@pytest.fixture(autouse=True)
def registered(own_registries: None) -> list[str]:
    """Registers a strategy with every hook; what it saw."""
    seen: list[str] = []

    @register_strategy("every-hook")
    class EveryHook(Strategy):
        """Trains on the first half of the problems and the first two rationales."""

        def __init__(self, factor: float = 0.0) -> None:
            self.factor, self.steps = factor, 0

        def prepare(self, problems: Sequence[Any], model: nn.Module, processing_class: Any) -> Any:
            seen.append(f"prepare {len(problems)}")
            return problems[: len(problems) // 2]

        def rollout(self, problems: Sequence[EncodedProblem], student: Any) -> Any:
            seen.append("rollout")
            return [replace(p, rationales=p.rationales[:2]) for p in problems]

        def loss_terms(self) -> Sequence[LossTerm]:
            return [Ridge(self.factor)]

        def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
            self.steps += 1
            seen.append(f"step {step}")

        def state_dict(self) -> dict[str, Any]:
            return {"steps": self.steps}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.steps = state["steps"]
            seen.append(f"resumed at {self.steps}")

    return seen


def test_a_problem_that_only_fills_a_place_has_no_say(tmp_path: Path) -> None:
    """A rank without work runs one: strategies must not add up its weights."""
    seen: list[list[float]] = []

    @register_strategy("sums-weights")
    class SumsWeights(Strategy):
        def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
            seen.append(segment_sum(weights.used, pass_.batch.problem_offsets).tolist())
            return torch.ones_like(weights.weight)

    trainer = trainer_of(tmp_path, rows_of(*TEACHERS), strategy="sums-weights")
    trainer.model.train()
    items = [trainer.train_dataset[i] for i in (0, -2)]
    assert [item.counted for item in items] == [True, False]
    (both, outcome), (one, _) = (trainer._loss(own, OpenStep(), 0) for own in (items, items[:1]))
    assert [n for sums in seen for n in sums] == pytest.approx([1.0, 0.0, 1.0])
    torch.testing.assert_close(both, one, rtol=1e-4, atol=0)
    assert outcome.records[0].weight == [1.0] * 3


def test_hooks_are_called_in_order(tmp_path: Path, registered: list[str]) -> None:
    """Two steps over two of the four problems, each with two of its three rationales."""
    settings = {"strategy": "every-hook", "per_device_train_batch_size": 2}
    ours = train(tmp_path / "ours", rows_of(*TEACHERS), **settings)
    assert registered == ["prepare 4", "rollout", "step 1", "rollout", "step 2"]
    half = rows_of(*TEACHERS, problems=2)
    first_two = [row for row in half if row["teacher"] != "wrong-step-2"]
    plain = train(tmp_path / "plain", first_two, per_device_train_batch_size=2)
    assert ours[0] == pytest.approx(plain[0], abs=1e-5)
    torch.testing.assert_close(ours[1], plain[1], rtol=0, atol=2e-5)


def test_a_loss_term_adds_to_the_loss_and_its_gradient(tmp_path: Path) -> None:
    """With factor 0 nothing changes; with another the loss grows and the parameters differ."""
    rows = rows_of(*TEACHERS)
    settings = {"strategy": "every-hook", "per_device_train_batch_size": 2}
    without, zero, ridge = (
        train(tmp_path / name, rows, **settings, strategy_options={"factor": factor})
        for name, factor in (("without", 0.0), ("zero", 0.0), ("ridge", 10.0))
    )
    assert torch.equal(without[1], zero[1])
    assert ridge[0][0] > without[0][0] + 0.1
    assert not torch.allclose(ridge[1], without[1], atol=1e-4)


def test_state_is_kept_and_resumed(tmp_path: Path, registered: list[str]) -> None:
    settings = {
        "strategy": "every-hook",
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    rows = rows_of(*TEACHERS)
    train(tmp_path / "run", rows, **settings, max_steps=1)
    state = json.loads((tmp_path / "run/checkpoint-1/compact_state.json").read_text())
    assert state["strategy"] == {"name": "every-hook", "state": {"steps": 1}}
    whole = train(tmp_path / "whole", rows, **settings)
    registered.clear()
    resumed = train(
        tmp_path / "run",
        rows,
        **settings,
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"),
    )
    assert "resumed at 1" in registered and "step 2" in registered and "step 1" not in registered
    assert torch.equal(resumed[1], whole[1])


def test_another_strategy_does_not_resume(tmp_path: Path) -> None:
    """The checkpoint says which strategy its state belongs to."""
    saving = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    train(tmp_path, rows_of(*TEACHERS), **saving, strategy="every-hook", max_steps=1)
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="strategy must be 'every-hook' to resume.* got None"):
        train(tmp_path, rows_of(*TEACHERS), **saving, resume_from_checkpoint=checkpoint)


def test_rollouts_that_cannot_be_used(tmp_path: Path) -> None:
    """Kept leaves need the same rationales at every step, and a rollout keeps their number."""
    with pytest.raises(ValueError, match="leaf_every must be 1 with strategy every-hook"):
        train(tmp_path / "a", rows_of(*TEACHERS), strategy="every-hook", leaf_every=2)

    @register_strategy("drops")
    class Drops(Strategy):
        def rollout(self, problems: Sequence[EncodedProblem], student: Any) -> Any:
            return problems[1:]

    with pytest.raises(ValueError, match="rollout of Drops must return 4 problems.* got 3"):
        train(tmp_path / "b", rows_of(*TEACHERS), strategy="drops")


def test_the_consistency_term_is_a_loss_term() -> None:
    term: LossTerm = ConsistencyTerm(0.1, "answer")
    assert term.name == "consistency"


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("no-such", {}, "strategy must be one of .*every-hook.*got 'no-such'"),
        (None, {"factor": 1}, "strategy must be given with strategy_options"),
        ("every-hook", {"rate": 1}, "strategy_options of every-hook: .*rate"),
    ],
)
def test_bad_strategies(name: str | None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_strategy(name, options)
