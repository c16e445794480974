"""The plain policies against their formulas, on the numbers of a real pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compact.metrics import get_metric
from compact.passes import Needs, Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import Weigher, make_weigher, policies
from compact.weighting.policies import Policy, register_policy
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
        return run_pass(_STUDENT, batch, statistics=("rank", "sum_p2"))[2]


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


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match="override of softmax-nll: tau must be .* above 0, got 0"):
        make_weigher("softmax-nll", tau=0)


def test_policies_that_read_the_answer(finished: Pass) -> None:
    """The most common answer, the right answer, or who wrote it."""
    found = finished
    np.testing.assert_allclose(weight(found, "answer-vote"), [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(weight(found, "rejection"), [0.5, 0, 0.5, 0])
    np.testing.assert_allclose(weight(found, "oracle", teachers={"t1"}), [0, 1, 0, 0])
    np.testing.assert_allclose(weight(found, "single:t3"), [0, 0, 0, 1])
    np.testing.assert_allclose(weight(found, "single:nobody"), np.zeros(4))
    np.testing.assert_allclose(weight(found, "uniform"), np.full(4, 0.25))


def test_rejection_skips_a_problem_without_a_right_rationale(finished: Pass) -> None:
    """Nobody states the gold answer: no weight, so the problem has no loss."""
    (problem,) = finished.batch.problems
    batch = replace(finished.batch, problems=(replace(problem, gold="9"),))
    np.testing.assert_allclose(weight(replace(finished, batch=batch), "rejection"), np.zeros(4))


@pytest.mark.parametrize("teachers", [(), "t1"])
def test_oracle_must_be_told_who_is_right(teachers: object) -> None:
    """The message says what to use where the gold answer is all that is known."""
    with pytest.raises(
        ValueError, match="override of oracle: teachers must list .*, use rejection"
    ):
        make_weigher("oracle", teachers=teachers)


def test_policies_by_length(finished: Pass) -> None:
    """Rationales of 5, 9, 7 and 12 tokens."""
    np.testing.assert_allclose(weight(finished, "longest"), [0, 0, 0, 1])
    np.testing.assert_allclose(weight(finished, "shortest"), [1, 0, 0, 0])
    np.testing.assert_allclose(weight(finished, "sft"), np.array([5, 9, 7, 12]) / 33, rtol=1e-6)


def test_sft_is_the_mean_over_all_tokens(finished: Pass) -> None:
    """The loss of plain SFT on the rationales of one problem."""
    means = by_rationale(finished, finished.stats.nll)
    loss = float((weight(finished, "sft") * means).sum())
    assert loss == pytest.approx(float(finished.stats.nll.mean()), rel=1e-5)
    assert not make_weigher("sft").needs.student


def test_persyn_takes_the_most_likely_of_the_right_ones(finished: Pass) -> None:
    """0.6 right + 0.4 likely: right comes first; without a right one, the most likely is taken."""
    likely = -by_rationale(finished, finished.stats.nll)
    scaled = (likely - likely.min()) / (likely.max() - likely.min())
    for gold in ("7", "8", "9"):
        (problem,) = finished.batch.problems
        batch = replace(finished.batch, problems=(replace(problem, gold=gold),))
        right = np.array([float(a == gold) for a in _ANSWERS])
        best = int((0.6 * right + 0.4 * scaled).argmax())
        found = weight(replace(finished, batch=batch), "persyn")
        np.testing.assert_allclose(found, np.eye(4)[best])
        assert right[best] == right.max()


def test_policies_say_which_statistics_they_read(finished: Pass) -> None:
    """Whoever runs the pass asks for them."""
    assert make_weigher("lark-chi2").needs.statistics == ("sum_p2",)
    assert make_weigher("rsr-min").needs.statistics == ("rank",)
    assert make_weigher("longest").needs.statistics == ()
    np.testing.assert_allclose(
        weight(finished, "rsr-min"), np.eye(4)[int(get_metric("rsr").score(finished).argmin())]
    )


def test_lark_chi2_is_its_formula(finished: Pass) -> None:
    """B = 3 of 4 by default, or what is asked for."""
    score = get_metric("lark").score(finished).double().numpy()
    for keep in (1, 2, 3, None, 4):
        kept = min(keep or 3, 3)
        order = np.argsort(-score)
        left_out, top = score[order[kept]], order[:kept]
        wanted = np.zeros(4)
        wanted[top] = (score[top] - left_out) / (kept * (score[top].mean() - left_out))
        found = weight(finished, "lark-chi2", **({} if keep is None else {"keep": keep}))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert found.sum() == pytest.approx(1.0, abs=1e-6) and (found > 0).sum() <= kept


@pytest.mark.parametrize(
    "score, keep, wanted",
    [
        ([0.3], None, [1.0]),
        ([0.2, 0.2, 0.2], None, [1 / 3, 1 / 3, 1 / 3]),
        ([0.5, 0.2, 0.2], 2, [1.0, 0.0, 0.0]),
        ([0.2, 0.2, 0.1], 1, [0.5, 0.5, 0.0]),
        ([0.4, 0.3, 0.1], 9, [0.6, 0.4, 0.0]),
        ([-0.4, -0.1], None, [0.0, 1.0]),
    ],
)
def test_lark_chi2_with_ties(score: list[float], keep: int | None, wanted: list[float]) -> None:
    """Ties get the same weight, whoever comes first."""
    policy = policies.POLICIES["lark-chi2"](**({} if keep is None else {"keep": keep}))
    values = torch.tensor(score)
    found = policy.weigh(values, torch.tensor([0, len(score)]))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("keep", [0, True, 1.5])
def test_lark_chi2_keeps_at_least_one(keep: object) -> None:
    with pytest.raises(
        ValueError, match=f"override of lark-chi2: keep must be a whole number .*, got {keep}"
    ):
        make_weigher("lark-chi2", keep=keep)


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


@pytest.mark.usefixtures("own_registries")
def test_a_policy_names_the_statistics_that_it_reads(finished: Pass) -> None:
    """The attribute of the policy becomes that of its weigher; without it there are none."""

    @register_policy("first-ranked")
    def first_ranked() -> Policy:
        def policy(pass_: Pass, _: int) -> torch.Tensor:
            assert pass_.stats.rank is not None
            first = (pass_.stats.rank == 1).float() + 0.1
            mass = torch.stack([x.mean() for x in first.split(sizes)])
            return mass / mass.sum()

        policy.needs = Needs(statistics=("rank",))  # type: ignore[attr-defined]
        return policy

    sizes = finished.batch.token_offsets.diff().tolist()
    weigher = make_weigher("first-ranked")
    assert weigher.needs.statistics == ("rank",) and make_weigher("uniform").needs.statistics == ()
    with torch.no_grad():
        pass_ = run_pass(_STUDENT, finished.batch, statistics=weigher.needs.statistics)[2]
    assert float(weigher(pass_).weight.sum()) == pytest.approx(1.0)
