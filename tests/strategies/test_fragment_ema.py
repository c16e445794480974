"""Fragment EMA: how much moves, its mean, its term, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.passes.forward import observe, run_pass
from compact.passes.packing import build_batch
from compact.strategies.fragment_ema import FragmentEma, momentum_at
from compact.student import Student
from compact.trainer import CompactTrainer
from helpers.resuming import assert_resumes
from helpers.trajectories import TEACHERS, rows_of, train


def _model(tensors: int) -> nn.Module:
    return nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(tensors))


def test_a_fifth_of_the_tensors_moves_and_the_mean_is_a_plain_average() -> None:
    """800 tensors, 40 steps: 20% +- 3 in each; their mean follows an EMA of rate .2 (1 - m)."""
    model = _model(800)
    strategy = FragmentEma(momentum=0.9)
    strategy.begin(model, 40)
    plain, before = 0.0, torch.zeros(800)
    for step in range(1, 41):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float(step))
        strategy.after_step(model, step, None)
        now = torch.cat(list(strategy.average.values()))
        moved = float((now != before).float().mean())
        rate = 1 - momentum_at(0.9, step, 40)
        if step < 40:  # the momentum of the last step is 1
            assert 0.17 - 0.02 <= moved <= 0.23 + 0.02
        plain += 0.2 * rate * (step - plain)
        before = now.clone()
    assert float(before.mean()) == pytest.approx(plain, rel=0.05)
    log = strategy.take_log()
    assert log["fragments moved"] == pytest.approx(0.2, abs=0.03)


def test_the_mean_of_a_bfloat16_student_moves() -> None:
    """Each move is less than half a unit in the last place of bfloat16, where it would be lost."""
    model = nn.ParameterList([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    strategy = FragmentEma(share=1.0, momentum=0.99)
    strategy.begin(model, 100)
    with torch.no_grad():
        model[0].fill_(1.125)
    left = 0.125
    for step in range(1, 51):
        strategy.after_step(model, step, None)
        left *= momentum_at(0.99, step, 100)
    assert strategy.average["0"].tolist() == pytest.approx([1.125 - left] * 4, abs=1e-5)
    with strategy._averaged(model):
        assert model[0].dtype == torch.bfloat16 and 1.0 < model[0].tolist()[0] < 1.125
    assert model[0].tolist() == [1.125] * 4
    resumed = FragmentEma()
    resumed.load_state_dict({"0": torch.ones(4, dtype=torch.bfloat16)})  # of an older version
    resumed.begin(model, 100)
    assert resumed.average["0"].dtype == torch.float32


def test_momentum_grows_to_one() -> None:
    assert momentum_at(0.9, 0, 10) == pytest.approx(0.9)
    assert momentum_at(0.9, 5, 10) == pytest.approx(0.95)
    assert momentum_at(0.9, 10, 10) == 1.0


def test_the_term_is_zero_at_first_and_changes_the_run_later(tmp_path: Path) -> None:
    """The self-teacher starts as the student, so the first step is that of plain training."""
    rows = rows_of(*TEACHERS)
    plain = train(tmp_path / "a", rows)
    settings = {"strategy": "fragment-ema", "strategy_options": {"factor": 10.0}}
    ours = train(tmp_path / "b", rows, **settings)
    assert ours[0][0] == pytest.approx(plain[0][0], abs=1e-4)
    assert not torch.allclose(ours[1], plain[1], atol=1e-5)
    log = json.loads((tmp_path / "b/trainer_state.json").read_text())["log_history"]
    assert log[1]["strategy/kl to the self-teacher"] > 0


def test_under_autocast_the_self_teacher_has_its_own_weights() -> None:
    """As outside of the cache of autocast; and the student does not get those of the average."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0, hidden=32, layers=2).eval()
    student = Student.of(model, tokenizer)
    problems = [
        encode_problem(p, tokenizer, max_length=400)
        for p in load_problems(rows_of("good", problems=2))
    ]
    batch = build_batch(problems, layout="tree", leaves=False, pad_token_id=student.pad_token_id)
    strategy = FragmentEma()
    strategy.begin(model, 10)
    for average in strategy.average.values():
        average.mul_(1.2)

    def read() -> tuple[torch.Tensor, float]:
        """Returns the student's hidden states and the term, in a new context of autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            _, hidden, pass_ = run_pass(student, batch)
            term = strategy.term(hidden, pass_, torch.ones(2))
            again = run_pass(student, batch)[1]
        assert torch.equal(hidden, again)
        (gradient,) = torch.autograd.grad(again.float().sum(), student.weight)
        assert float(gradient.abs().max()) > 0
        return hidden, float(term.detach())

    hidden, term = read()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        _, alone, pass_ = run_pass(student, batch)
        want = float(strategy.term(alone, pass_, torch.ones(2)).detach())
    assert torch.equal(hidden, alone) and term == pytest.approx(want, rel=1e-3)
    assert want > 1e-3


def test_resumes(tmp_path: Path) -> None:
    assert_resumes(tmp_path, strategy="fragment-ema")


@pytest.mark.parametrize(
    "options", [{"share": 0}, {"share": ".2"}, {"momentum": 1}, {"factor": -1}]
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of fragment-ema must be .*got"):
        FragmentEma(**options)


@pytest.mark.slow
def test_the_self_teacher_is_better_where_rationales_are_corrupted(tmp_path: Path) -> None:
    """30% of the rationales belong to other questions, at a high learning rate.

    The average has a lower loss on sound rationales of other questions than the student.
    """
    tokenizer = build_tokenizer()
    rows = zoo.make_rows(("good",), 60, seed=1)
    spare = zoo.make_rows(("style-shifted",), 60, seed=2)
    rows = [
        row | {"completion": spare[i]["completion"]} if i % 10 < 3 else row
        for i, row in enumerate(rows)
    ]
    args = CompactConfig(
        output_dir=str(tmp_path),
        preset="uniform",
        strategy="fragment-ema",
        strategy_options={"momentum": 0.5, "factor": 0.0},
        max_steps=150,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        max_length=400,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = build_model(tokenizer, 0, hidden=32, layers=1)
    trainer = CompactTrainer(model, args, rows, processing_class=tokenizer)
    trainer.train()
    sound = [
        encode_problem(p, tokenizer, max_length=400)
        for p in load_problems(zoo.make_rows(("good",), 40, seed=3))
    ]
    model.eval()
    student = float(observe(trainer.student, sound, leaves=False).stats.nll.mean())
    strategy = trainer.strategy
    assert isinstance(strategy, FragmentEma)
    with strategy._averaged(model):
        average = float(observe(trainer.student, sound, leaves=False).stats.nll.mean())
    assert average < student
