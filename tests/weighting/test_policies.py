"""The plain policies against their formulas, on the numbers of a real pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compact.passes import Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import Weigher, make_weigher
from compact.weighting.policies import POLICIES, Policy, register_policy
from helpers.toy import make_model, make_problem

_STUDENT = Student.of(make_model("llama").eval())
_ANSWERS = ("7", "8", "7", None)


@pytest.fixture(scope="module")
def finished() -> Pass:
    """Four rationales of a problem with gold answer 7."""
    problem = make_problem(1, [5, 9, 7, 12])
    told = [replace(r, answer=a) for r, a in zip(problem.rationales, _ANSWERS, strict=True)]
    problem = replace(problem, rationales=tuple(told), gold="7")
    batch = build_batch([problem], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def weight(pass_: Pass, name: str, **settings: object) -> np.ndarray:
    """[4] weights of a new policy."""
    return make_weigher(name, **settings)(pass_).weight.double().numpy()


def by_rationale(pass_: Pass, values: torch.Tensor) -> np.ndarray:
    """[4] means over the tokens of each rationale."""
    sizes = pass_.batch.token_offsets.diff().tolist()
    return np.array([float(part.double().mean()) for part in values.split(sizes)])


def test_policies_that_read_the_loss(finished: Pass) -> None:
    """softmax-nll, CA-MKD and EBKD, written out."""
    nll = by_rationale(finished, finished.stats.nll)
    entropy = by_rationale(finished, finished.stats.entropy)

    def softmax(values: np.ndarray) -> np.ndarray:
        mass = np.exp(values - values.max())
        return mass / mass.sum()

    for name, wanted in (
        ("softmax-nll", softmax(-nll)),
        ("ca-mkd", (1 - softmax(nll)) / 3),
        ("ebkd", (1 - entropy / entropy.sum()) / 3),
    ):
        np.testing.assert_allclose(weight(finished, name), wanted, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        weight(finished, "softmax-nll", tau=0.1), softmax(-nll / 0.1), atol=1e-4
    )


def test_policies_that_read_the_answer(finished: Pass) -> None:
    """The most common answer, the right answer, or who wrote it."""
    found = finished
    np.testing.assert_allclose(weight(found, "answer-vote"), [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(weight(found, "oracle"), [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(weight(found, "oracle", teachers={"t1"}), [0, 1, 0, 0])
    np.testing.assert_allclose(weight(found, "single:t3"), [0, 0, 0, 1])
    np.testing.assert_allclose(weight(found, "single:nobody"), np.zeros(4))
    np.testing.assert_allclose(weight(found, "uniform"), np.full(4, 0.25))


def test_random_depends_on_seed_and_step_only(finished: Pass) -> None:
    """Drawn again at every step, the same in every run, uniform over the simplex."""

    def draws(weigher: Weigher, steps: int) -> np.ndarray:
        found = []
        for _ in range(steps):
            found.append(weigher(finished).weight.numpy())
            weigher.update({}, finished.batch.problem_offsets)
        return np.stack(found)

    first = draws(make_weigher("random", seed=1), 400)
    np.testing.assert_array_equal(first[:5], draws(make_weigher("random", seed=1), 5))
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first[0], draws(make_weigher("random", seed=2), 1)[0])
    np.testing.assert_allclose(first.mean(0), np.full(4, 0.25), atol=0.03)
    # A coordinate of a uniform draw from the simplex has variance (K - 1) / (K^2 (K + 1)).
    np.testing.assert_allclose(first.var(0), np.full(4, 3 / 80), atol=0.012)


def test_a_policy_names_the_statistics_that_it_reads(
    finished: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attribute of the policy becomes that of its weigher; without it there are none."""
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    monkeypatch.setattr(POLICIES, "_sources", dict(POLICIES._sources))

    @register_policy("first-ranked")
    def first_ranked() -> Policy:
        def policy(pass_: Pass, _: int) -> torch.Tensor:
            assert pass_.stats.rank is not None
            first = (pass_.stats.rank == 1).float() + 0.1
            mass = torch.stack([x.mean() for x in first.split(sizes)])
            return mass / mass.sum()

        policy.statistics = ("rank",)
        return policy

    sizes = finished.batch.token_offsets.diff().tolist()
    weigher = make_weigher("first-ranked")
    assert weigher.statistics == ("rank",) and make_weigher("uniform").statistics == ()
    with torch.no_grad():
        pass_ = run_pass(_STUDENT, finished.batch, statistics=weigher.statistics)[2]
    assert float(weigher(pass_).weight.sum()) == pytest.approx(1.0)
