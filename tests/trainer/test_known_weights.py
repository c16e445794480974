"""Weights that the data alone decide: a trained head takes one sweep and gives the same results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compact import Needs
from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import Pass, forward
from compact.passes.encode import encode_problem
from compact.passes.packing import build_batch
from compact.strategies import Strategy, register_strategy
from compact.student import Student
from compact.trainer import CompactTrainer
from compact.weighting import POLICIES, Weights, make_weigher, register_policy

BY_DATA = ("uniform", "random", "answer-vote", "rejection", "shortest")
ROWS = zoo.make_rows(("good", "verbose", "wrong-step"), 8, seed=3)


def trained(folder: Path, preset: str, **settings: Any) -> tuple[dict[str, Tensor], list[Any]]:
    """Trains all of a student.

    Returns:
        The trained weights, and the `token_weight` that each pass gave to the operator of the head.
    """
    told: list[Any] = []
    plain = Student.token_stats

    def spied(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("gold") is not None and torch.is_grad_enabled():
            told.append(kwargs["token_weight"])
        return plain(*args, **kwargs)

    tokenizer = build_tokenizer()
    args = CompactConfig(
        output_dir=str(folder),
        preset=preset,
        **{"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        | settings,
        learning_rate=1e-2,
        max_length=600,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    model = build_model(tokenizer, 0, hidden=32, layers=1)
    run = CompactTrainer(model, args, ROWS, processing_class=tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "token_stats", spied)
        run.train()
    return {name: value.detach() for name, value in model.state_dict().items()}, told


@pytest.mark.parametrize("preset", BY_DATA)
def test_one_sweep_trains_as_two_do(
    tmp_path: Path, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "compact_ops"):
        ours, told = trained(tmp_path / "one", preset)
    assert "computes the gradients again" not in caplog.text
    assert len(told) == 6
    assert all(isinstance(weight, Tensor) for weight in told)
    theirs, untold = trained(tmp_path / "two", preset, head_grad="recompute")
    assert untold == [None] * 6
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "robust"},
        {"preset": "softmax-nll"},
        {"token_weights": "eaft"},
        {"strategy": "halving"},
    ],
    ids=str,
)
def test_weights_that_read_the_student_are_not_known(
    tmp_path: Path, settings: dict[str, str]
) -> None:
    @register_strategy("halving")
    class Halving(Strategy):
        def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
            return weights.weight / (1.0 + pass_.stats.nll.mean())

    assert trained(tmp_path, **{"preset": "uniform"} | settings)[1] == [None] * 6


def test_policies_of_the_data_give_the_same_before_the_student_runs() -> None:
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, 0, hidden=32, layers=1), tokenizer)
    problems = [encode_problem(p, tokenizer, max_length=600) for p in load_problems(ROWS)]
    pass_ = forward.observe(student, problems)
    batch = build_batch(problems, layout="tree", leaves=False, pad_token_id=0)
    before = Pass.before(batch, student)
    given: dict[str, dict[str, Any]] = {name: {} for name in BY_DATA}
    given |= {"single": {"teacher": "good"}, "oracle": {"teachers": ["good"]}}
    for name, settings in given.items():
        policy = POLICIES[name](**settings)
        assert not policy.needs.student
        torch.testing.assert_close(policy(before, 2), policy(pass_, 2), atol=0, rtol=0)


@pytest.mark.usefixtures("own_registries")
def test_a_policy_that_says_so_wrongly_is_told(tmp_path: Path) -> None:
    def wrong() -> Any:
        def policy(pass_: Pass, _: int) -> Tensor:
            return pass_.stats.nll

        policy.needs = Needs(student=False)  # type: ignore[attr-defined]
        return policy

    register_policy("wrong")(wrong)
    assert not make_weigher("wrong").needs.student
    with pytest.raises(RuntimeError, match="stats was read before the student ran"):
        # One micro-batch a step: after a failure between two, accelerate would still wait for the
        # second, in later tests too.
        trained(tmp_path, "wrong", gradient_accumulation_steps=1)


def test_needs_cannot_say_both() -> None:
    with pytest.raises(ValueError, match="student must be True in .*leaves=True"):
        Needs(student=False, leaves=True)


def test_reading_more_of_a_pass_that_has_not_run_is_told() -> None:
    nothing: Any = None
    before = Pass.before(nothing, nothing)
    for name in ("stats", "hidden", "leaf_hidden", "leaf_logp", "option_logp"):
        with pytest.raises(RuntimeError, match=f"{name} was read before the student ran"):
            getattr(before, name)
