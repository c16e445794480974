"""From scores to weights: the formula and its settings, running statistics, weak spots by name."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo import TEACHERS, make_rows, with_filler
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.metrics import get_metric
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import make_weigher, register_policy
from helpers.toy import ThinkingWords, make_model, make_problem

_STUDENT = replace(
    Student.of(make_model("llama").eval()), processing_class=ThinkingWords(3, 11, 40)
)


def pass_of(problems: list[EncodedProblem], name: str) -> Pass:
    """A pass in the layout and with the leaves that a weigher asks for."""
    weigher = make_weigher(name)
    layout = "padded" if weigher.needs.padded else "tree"
    batch = build_batch(problems, layout=layout, leaves=weigher.needs.leaves, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def test_a_score_that_is_not_finite_is_named() -> None:
    """An unusable weight raises with metric, question and teacher; it never falls back."""
    weigher = make_weigher("robust")
    found = pass_of([make_problem(6, [6, 8])], "robust")
    found.leaf_logp[:] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got nan.*"):
        weigher(found)


def test_a_policy_with_a_weight_below_0_is_refused() -> None:
    """The student would be trained away from that rationale, without a word."""
    register_policy("below-0")(lambda: lambda pass_, updates: torch.tensor([-2.0, 3.0]))
    with pytest.raises(ValueError, match="policy weights of below-0 must be >= 0, got -2"):
        make_weigher("below-0")(pass_of([make_problem(6, [6, 8])], "below-0"))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("teachers", [2, 4, 8])
def test_random_scores_leave_most_teachers_in(teachers: int, seed: int) -> None:
    """Pure noise, step by step: `robust` keeps 80% of K as effective teachers, `released` fewer."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.arange(0, 4 * teachers + 1, teachers)
    weighers = {name: make_weigher(name) for name in ("robust", "released")}
    effective = dict.fromkeys(weighers, 0.0)
    for _ in range(100):
        for name, weigher in weighers.items():
            scores = {axis: torch.randn(4 * teachers, generator=g) for axis in weigher.metrics}
            weight = weigher.weigh(scores, offsets).weight.view(4, teachers)
            effective[name] += float((1 / weight.square().sum(dim=1)).mean()) / 100
            weigher.update(scores, offsets)
    assert effective["robust"] >= 0.8 * teachers
    assert effective["released"] < effective["robust"]


def test_without_its_temperature_noise_would_concentrate_the_weights() -> None:
    weigher = make_weigher("robust", tau=0.3)
    generator = torch.Generator().manual_seed(0)
    scores = {axis: torch.randn(400, generator=generator) for axis in _SCORES}
    weight = weigher.weigh(scores, torch.arange(101) * 4).weight.view(100, 4)
    assert float((1.0 / weight.square().sum(1)).mean()) < 0.8 * 4


def test_filler_raises_released_adaptability() -> None:
    """Ten lines of filler around the same steps: longer is better to it, which is its weakness."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, seed=0, layers=2).eval(), tokenizer)
    rows = make_rows(("good",), 6, seed=21)
    filled = [
        row | {"teacher": "filled", "completion": with_filler(row["completion"], rng, 10)}
        for row, rng in zip(rows, map(random.Random, range(6)), strict=True)
    ]
    both = [row for pair in zip(rows, filled, strict=True) for row in pair]
    problems = [encode_problem(p, tokenizer, max_length=2000) for p in load_problems(both)]
    batch = build_batch(
        problems, layout="padded", leaves=False, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        score = get_metric("probe-released").score(run_pass(student, batch)[2]).view(-1, 2)
    assert bool((score[:, 1] > score[:, 0]).all())


def test_answer_vote_follows_the_majority() -> None:
    """Two teachers who share a wrong answer outvote the right one: why `answer` is not enough."""
    assert {"good", "colluding-a", "colluding-b"} <= TEACHERS.keys()
    rows = make_rows(("good", "colluding-a", "colluding-b"), 8, seed=3)
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, seed=0, layers=1).eval(), tokenizer)
    problems = [encode_problem(p, tokenizer, max_length=600) for p in load_problems(rows)]
    batch = build_batch(problems, layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        score = get_metric("answer").score(run_pass(student, batch)[2]).view(-1, 3)
    assert float((score[:, 0] < score[:, 1]).float().mean()) > 0.5


def _plain_weights(
    scores: dict[str, list[float]],
    beta: dict[str, float],
    s0: dict[str, float],
    *,
    tau: float,
    ddof: int = 0,
    eps: float = 0.0,
    floor: float = 0.0,
) -> list[float]:
    """The weights of one problem, word for word as the design has them."""
    count = len(next(iter(scores.values())))
    u = [0.0] * count
    for axis, values in scores.items():
        mean = sum(values) / count
        var = sum((v - mean) ** 2 for v in values) / max(count - ddof, 1)
        scale = var**0.5 + eps if eps else (var + s0[axis] ** 2) ** 0.5
        u = [a + beta[axis] * (v - mean) / scale for a, v in zip(u, values, strict=True)]
    mass = [math.exp(a / tau) for a in u]
    return [(1 - floor) * m / sum(mass) + floor / count for m in mass]


_SCORES = {
    "adaptability": [1.0, 3.0, -2.0, 0.5],
    "consensus": [0.2, 0.9, 0.4, 0.7],
    "difficulty": [2.0, 1.0, 4.0, 1.5],
}
_OFFSETS = torch.tensor([0, 4])


def _tensors(scores: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    return {axis: torch.tensor(values) for axis, values in scores.items()}


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_weights_equal_their_formula(shrink: float, tau: float, floor: float) -> None:
    """Shrinkage by the running spread, temperature and floor."""
    weigher = make_weigher("robust", beta=(1.0, 2.0, 0.5), shrink=shrink, tau=tau, floor=floor)
    seen = _tensors({axis: [2.0 * v for v in values] for axis, values in _SCORES.items()})
    weigher.update(seen, _OFFSETS)
    s0 = {axis: shrink * float(s.double().std(unbiased=False)) for axis, s in seen.items()}
    found = weigher.weigh(_tensors(_SCORES), _OFFSETS)
    beta = {"adaptability": 1.0, "consensus": 2.0, "difficulty": -0.5}
    wanted = _plain_weights(_SCORES, beta, s0, tau=tau, floor=floor)
    assert found.weight.tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(found.weight.min()) >= floor / 4


def test_eps_stands_in_place_of_the_prior() -> None:
    """`released` and `paper` divide by std(ddof=1) + 1e-4 whatever was seen before."""
    weigher = make_weigher("paper")
    weigher.update(_tensors({axis: [100.0, -100.0, 0, 0] for axis in _SCORES}), _OFFSETS)
    beta = {"adaptability": 1.0, "consensus": 1.0, "difficulty": -0.5}
    wanted = _plain_weights(_SCORES, beta, {}, tau=1.0, ddof=1, eps=1e-4)
    assert weigher.weigh(_tensors(_SCORES), _OFFSETS).weight.tolist() == (
        pytest.approx(wanted, abs=1e-6)
    )


def test_zscores_are_those_that_weigh() -> None:
    """Reported z-scores have mean 0, and standard deviation below 1 by the prior's share."""
    weigher = make_weigher("robust", shrink=1.0)
    weigher.update(_tensors(_SCORES), _OFFSETS)
    z = weigher.weigh(_tensors(_SCORES), _OFFSETS).zscores
    for values in z.values():
        assert float(values.mean()) == pytest.approx(0, abs=1e-6)
        assert float(values.std(unbiased=False)) == pytest.approx(0.5**0.5, abs=1e-5)


def test_warm_up_goes_from_uniform_to_the_weights() -> None:
    """Linear in the problems seen; problems with one teacher do not change the spread."""
    weigher = make_weigher("robust", warmup=8)
    full = make_weigher("robust")
    scores = _tensors(_SCORES)
    assert weigher.weigh(scores, _OFFSETS).weight.tolist() == pytest.approx([0.25] * 4)
    for seen in range(1, 10):
        for one in (weigher, full):
            one.update(scores, _OFFSETS)
            one.update({axis: s[:1] for axis, s in scores.items()}, torch.tensor([0, 1]))
        share = min(seen / 8, 1.0)
        wanted = share * full.weigh(scores, _OFFSETS).weight + (1 - share) * 0.25
        torch.testing.assert_close(weigher.weigh(scores, _OFFSETS).weight, wanted)


def test_running_spread_is_a_mean_first_and_follows_later() -> None:
    """The first twenty steps have equal shares; each later step has a share of a twentieth."""
    weigher = make_weigher("robust")

    def update(factor: float) -> None:
        weigher.update({a: factor * s for a, s in _tensors(_SCORES).items()}, _OFFSETS)

    unit = torch.tensor(_SCORES["consensus"]).double().std(unbiased=False)
    for step in range(1, 21):
        update(float(step))
        assert weigher.spread["consensus"] == pytest.approx(float(unit) * (step + 1) / 2, rel=1e-6)
    before = weigher.spread["consensus"]
    update(100.0)
    assert weigher.spread["consensus"] == (
        pytest.approx(0.95 * before + 0.05 * 100 * float(unit), rel=1e-6)
    )


def test_state_comes_back() -> None:
    """A restored weigher weighs as the one that was saved."""
    weigher = make_weigher("robust")
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        weigher.update({axis: torch.randn(4, generator=g) for axis in _SCORES}, _OFFSETS)
    other = make_weigher("robust")
    other.load_state_dict(json.loads(json.dumps(weigher.state_dict())))
    scores = _tensors(_SCORES)
    assert torch.equal(other.weigh(scores, _OFFSETS).weight, weigher.weigh(scores, _OFFSETS).weight)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("robst", {}, "preset must be one of released, paper, robust, uniform, .*'robst'"),
        ("single", {}, "got 'single'"),
        ("robust", {"temperature": 1}, "override of robust must be one of .*'temperature'"),
        ("random", {"tau": 1}, "override of random: "),
        ("robust", {"tau": 0}, "override of robust: tau must be a number of at least 1e-06, got 0"),
        ("robust", {"ddof": 0.5}, "ddof must be a whole number of at least 0 and at most 1, got"),
        ("robust", {"floor": 2}, "floor must be a number of at least 0 and at most 1, got 2"),
        ("robust", {"warmup": float("inf")}, "warmup must be a number of at least 0, got inf"),
        ("robust", {"beta": (1, 2)}, "beta must be three numbers"),
        ("robust", {"beta": (1, 2, "3")}, "beta: each factor must be a number, got '3'"),
        ("paper", {"adaptability": "aslec-casl"}, "must not be aslec-casl in a preset"),
    ],
)
def test_bad_overrides_are_told(name: str, overrides: dict[str, Any], message: str) -> None:
    """The message lists the known names, or says what is allowed."""
    with pytest.raises(ValueError, match=message):
        make_weigher(name, **overrides)
