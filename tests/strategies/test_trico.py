"""TRiCo: the factor of a noise score decays, slopes equal autograd, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo_student import build_tokenizer
from compact.passes.encode import encode_problem
from compact.strategies import trico
from compact.strategies.trico import Trico
from compact.weighting.weighers import Weights
from helpers.passes import pass_of
from helpers.resuming import assert_resumes
from helpers.toy import make_problem
from helpers.trajectories import TEACHERS, rows_of, train


def _gradients(monkeypatch: pytest.MonkeyPatch, cosines: torch.Tensor) -> None:
    """Plants gradients with given cosines to G_val = (1, 0), problems of K rationales."""
    planted = [torch.stack([own, (1 - own.square()).clamp(min=0).sqrt()], dim=1) for own in cosines]
    monkeypatch.setattr(trico, "head_gradients", lambda _: planted)


def _strategy(**options: Any) -> Trico:
    strategy = Trico(**options)
    strategy._target = torch.tensor([1.0, 0.0])
    return strategy


def _weights(z: dict[str, torch.Tensor]) -> Weights:
    return Weights(next(iter(z.values())), z, z)


def test_the_beta_of_a_noise_score_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptability tells which gradient helps the gold set; consensus is noise."""
    g = torch.Generator().manual_seed(0)
    pass_ = pass_of([make_problem(q, [4, 4, 4]) for q in range(16)])
    strategy = _strategy(rate=0.5)
    for step in range(1, 201):
        z = {a: torch.randn(16, 3, generator=g) for a in ("adaptability", "consensus")}
        _gradients(monkeypatch, torch.tanh(z["adaptability"]))
        weight = strategy.weigh(pass_, _weights({a: v.flatten() for a, v in z.items()}))
        assert weight.view(16, 3).sum(1).tolist() == pytest.approx([1.0] * 16, abs=1e-5)
        strategy.after_step(torch.nn.Linear(1, 1), step, None)
    assert abs(strategy.beta["consensus"]) < 0.35 and strategy.beta["adaptability"] > 1.0
    log = strategy.take_log()
    assert log["beta/difficulty"] == -0.5 and log["tau"] == pytest.approx(
        math.exp(strategy.log_tau)
    )


def test_slopes_equal_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    pass_ = pass_of([make_problem(q, [4, 4, 4]) for q in range(5)])
    cosines = torch.rand(5, 3, generator=g) * 2 - 1
    _gradients(monkeypatch, cosines)
    z = {a: torch.randn(15, generator=g) for a in ("adaptability", "consensus", "difficulty")}
    strategy = _strategy(beta=(0.7, 1.2, 0.4), tau=0.6)
    strategy.weigh(pass_, _weights(z))
    beta = torch.tensor([0.7, 1.2, -0.4], requires_grad=True)
    log_tau = torch.tensor(math.log(0.6), requires_grad=True)
    u = beta @ torch.stack(list(z.values()))
    alpha = (u / log_tau.exp()).view(5, 3).softmax(1)
    (-(alpha * cosines).sum()).backward()
    assert list(strategy._slopes.values())[:3] == pytest.approx(beta.grad.tolist(), abs=1e-4)
    assert strategy._slopes["tau"] == pytest.approx(float(log_tau.grad), abs=1e-4)


def test_a_problem_that_does_not_train_has_no_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its rationales are wrong: what their gradients do says nothing about weights."""
    g = torch.Generator().manual_seed(2)
    pass_ = pass_of([make_problem(q, [4, 4, 4]) for q in range(2)])
    cosines, z = torch.rand(2, 3, generator=g), torch.randn(6, generator=g)
    usable = torch.tensor([True] * 3 + [False] * 3)
    strategy = _strategy()
    found = []
    for row in (1, 0):  # other gradients of the second problem
        _gradients(monkeypatch, torch.stack([cosines[0], cosines[row]]))
        strategy.weigh(pass_, Weights(z, {"consensus": z}, {"consensus": z}, usable))
        found.append(strategy._slopes)
        strategy._slopes = dict.fromkeys(strategy._slopes, 0.0)
    assert found[0] == pytest.approx(found[1], abs=1e-7) and found[0]["consensus"] != 0
    assert strategy._count == 2


def test_the_gold_set_does_not_train(tmp_path: Path) -> None:
    from compact.trainer.runlog import read_scores

    options = {"gold": 1, "every": 1}
    settings: dict[str, Any] = {"strategy": "trico", "strategy_options": options}
    train(tmp_path / "a", rows_of(*TEACHERS), **settings, preset="robust")
    table = read_scores(tmp_path / "a")
    assert len(set(table["question_id"].to_pylist())) == 3
    with pytest.raises(ValueError, match="preset must be one with scores with strategy trico"):
        train(tmp_path / "b", rows_of(*TEACHERS), **settings)
    with pytest.raises(ValueError, match="needs problems with a right rationale besides those"):
        train(tmp_path / "c", rows_of("wrong-step"), **settings, preset="robust")


def test_the_gold_set_is_the_last_right_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """No problem before them is encoded."""
    rows = rows_of("good", "wrong-step", problems=6)
    bad = rows[-1]["question_id"]
    rows = [r for r in rows if r["question_id"] != bad or r["teacher"] == "wrong-step-1"]
    problems = load_problems(rows)
    asked: list[str] = []

    def encode(problem: Any, *args: Any, **settings: Any) -> Any:
        asked.append(problem.question_id)
        return encode_problem(problem, *args, **settings)

    monkeypatch.setattr(trico, "encode_problem", encode)
    strategy = Trico(gold=2)
    left = strategy.prepare(problems, torch.nn.Identity(), build_tokenizer())
    ids = [p.question_id for p in problems]
    assert ids[-1] == bad and [p.question_id for p in left] == [*ids[:3], bad]
    assert [p.question_id for p in strategy._encoded] == ids[3:5] and asked == ids[:2:-1]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"floor": 0.2}, "floor of the preset must be 0 with strategy trico.* got 0.2"),
        ({"warmup": 10}, "warmup of the preset must be 0 with strategy trico.* got 10"),
        ({"beta": [1, 1, 0]}, "overrides must not have beta .* strategy_options {beta: ...}"),
        ({"tau": 2.0}, "overrides must not have tau .* strategy_options {tau: ...}"),
        (
            {"adaptability": "none", "consensus": "none", "difficulty": "none"},
            "overrides must leave one of adaptability, consensus, difficulty",
        ),
    ],
)
def test_settings_that_it_does_not_read_are_refused(
    tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(tmp_path, [], preset="robust", overrides=overrides, strategy="trico")


def test_resumes(tmp_path: Path) -> None:
    options = {"gold": 1, "every": 2, "rate": 1.0}
    assert_resumes(tmp_path, preset="robust", strategy="trico", strategy_options=options)


@pytest.mark.parametrize(
    "options",
    [
        *({"gold": 0}, {"gold": True}, {"every": 0}, {"rate": -1}, {"tau": 0}, {"tau": "1"}),
        *({"beta": [1]}, {"beta": 1.0}, {"beta": ["a", "b", "c"]}),
    ],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of trico.* must be .*got"):
        Trico(**options)
