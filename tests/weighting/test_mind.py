"""MIND: the weight follows a teacher that becomes learnable, smoothly; its state is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.metrics.posterior_consensus import agreement_of
from compact.weighting import make_weigher
from compact.weighting.mind import stated
from helpers.passes import pass_of
from helpers.resuming import assert_resumes
from helpers.toy import make_problem


def _losses(step: int, generator: torch.Generator) -> list[float]:
    """The third of three teachers becomes learnable at step 150; the losses are noisy."""
    base = [1.0, 1.0, 2.0 if step < 150 else 0.3] * 4
    return (torch.tensor(base) + 0.25 * torch.randn(12, generator=generator)).clamp(0.05).tolist()


def test_the_weight_follows_a_teacher_that_becomes_learnable() -> None:
    """And it varies less from step to step than softmax(-loss / tau)."""
    problems = [make_problem(q, [6, 6, 6]) for q in range(4)]
    g = torch.Generator().manual_seed(0)
    weigher = make_weigher("mind", rate=1e-2)
    ours, plain = [], []
    for step in range(400):
        pass_ = pass_of(problems, _losses(step, g))
        found = weigher(pass_)
        weigher.update(found.scores, pass_.batch.problem_offsets)
        nll = found.scores["nll"].view(4, 3)
        ours.append(found.weight.view(4, 3)[:, 2])
        plain.append((-nll / 0.2).softmax(1)[:, 2])
    mine, other = torch.stack(ours), torch.stack(plain)
    assert float(mine[120:150].mean()) < 0.15 and float(mine[370:].mean()) > 0.6
    changes = [
        float(series[lo:hi].diff(dim=0).square().mean())
        for series in (mine, other)
        for lo, hi in ((100, 150), (350, 400))
    ]
    assert changes[0] + changes[1] < changes[2] + changes[3]


def test_poor_rationales_are_dropped() -> None:
    """beta = 1 keeps the best only; beta = 0 keeps all. Before training the weights are uniform."""
    pass_ = pass_of([make_problem(0, [6, 6, 6])], [0.1, 1.0, 2.0])
    assert make_weigher("mind")(pass_).weight.tolist() == pytest.approx([1 / 3] * 3)
    for beta, kept in ((1.0, 1), (0.0, 3)):
        weigher = make_weigher("mind", beta=beta, rate=1e-2)
        for _ in range(100):
            weigher.update(weigher(pass_).scores, pass_.batch.problem_offsets)
        assert int((weigher(pass_).weight > 0).sum()) == kept


def test_consistency_of_stated_answers_is_one_minus_the_jsd() -> None:
    """Against the JSD of distributions on one answer each; no answer agrees with nobody."""
    problem = make_problem(0, [6, 6, 6, 6])
    answers = ["7", "7", None, "8"]
    rationales = tuple(
        replace(r, answer=a) for r, a in zip(problem.rationales, answers, strict=True)
    )
    pass_ = pass_of([replace(problem, rationales=rationales), make_problem(1, [6])])
    points = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    torch.testing.assert_close(stated(pass_)[:4], agreement_of(points))
    assert float(stated(pass_)[4]) == 0.0


def test_consistency_of_believed_answers_asks_for_options() -> None:
    believed = make_weigher("mind", consistency="believed")
    assert believed.needs.options and not make_weigher("mind").needs.options


def test_state_is_exact_as_json() -> None:
    """In the middle of an accumulation: the same weights after more steps, bit for bit."""
    problems = [make_problem(q, [6, 6, 6]) for q in range(4)]
    g = torch.Generator().manual_seed(0)
    weigher, other = make_weigher("mind"), make_weigher("mind")
    for step in range(20):
        pass_ = pass_of(problems, _losses(step, g))
        weigher.update(weigher(pass_).scores, pass_.batch.problem_offsets)
        if step == 9:
            other.load_state_dict(json.loads(json.dumps(weigher.state_dict())))
        elif step > 9:
            other.update(other(pass_).scores, pass_.batch.problem_offsets)
    assert torch.equal(weigher(pass_).weight, other(pass_).weight)
    assert "policy/meta loss" in weigher.take_log()


def test_resumes(tmp_path: Path) -> None:
    assert_resumes(
        tmp_path, preset="mind", overrides={"rate": 0.1, "every": 2, "consistency": "believed"}
    )


@pytest.mark.parametrize(
    "override",
    [
        *({"tau": 0}, {"tau": "x"}, {"beta": 2}, {"every": 0}, {"every": 2.5}),
        *({"rate": float("nan")}, {"seed": "a"}, {"consistency": "x"}),
    ],
)
def test_bad_settings(override: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"override of mind: {next(iter(override))} must be"):
        make_weigher("mind", **override)
