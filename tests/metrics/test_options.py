"""The metrics that read option leaves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compact.config import CompactConfig
from compact.metrics import get_metric
from compact.metrics.posterior_consensus import agreement_of
from compact.passes import Pass
from compact.passes.forward import observe
from compact.passes.types import EncodedOptions
from compact.student import Student
from compact.trainer import CompactTrainer
from compact.weighting import make_weigher
from helpers.toy import make_model, make_problem, with_options

NAMES = ("leak-adjusted", "option-contrast", "posterior-consensus")
READINGS = [((0, 1, 2),), ((0, 2), (0, 1, 2)), ((), (0, 1, 2))]


@pytest.fixture(scope="module")
def student() -> Student:
    """A tiny student."""
    return Student.of(make_model("llama").eval())


def by_hand(pass_: Pass, r: int, whole: bool) -> float:
    """M(x, y) - M(x) in plain Python, gold = option 1 of 3."""
    leaves, logp = pass_.batch.options, pass_.option_logp
    assert leaves is not None and logp is not None

    def contrast(place: int) -> float:
        s = logp[int(leaves.offsets[place]) : int(leaves.offsets[place + 1])].tolist()
        return float(s[1] - math.log(math.exp(s[0]) + math.exp(s[2])))

    place = int((leaves.whole if whole else leaves.unstated)[r])
    return contrast(place) - contrast(int(leaves.question[0]))


def test_contrast_and_leak_adjusted(student: Student) -> None:
    """Formulas by hand; a rationale that only states its answer is exactly 0."""
    problem = with_options(make_problem(1, [12, 14, 13], steps=3), *READINGS)
    pass_ = observe(student, [problem], options=True)
    whole, unstated = (get_metric(n).score(pass_) for n in ("option-contrast", "leak-adjusted"))
    for r in range(3):
        assert float(whole[r]) == pytest.approx(by_hand(pass_, r, True), abs=1e-5)
        assert float(unstated[r]) == pytest.approx(by_hand(pass_, r, False), abs=1e-5)
    assert float(unstated[2]) == 0.0 and float(whole[2]) != 0.0
    assert float(whole[0]) == float(unstated[0])


def test_what_has_no_options_scores_nothing(student: Student) -> None:
    """An open question, and one without a gold answer, have neutral scores."""
    unknown = with_options(make_problem(1, [9, 8]), ((0,),), ((0, 1),), gold=-1)
    question = replace(make_problem(2, [6, 9]), options=EncodedOptions((), -1, None, (), ()))
    pass_ = observe(student, [unknown, question], options=True)
    for name in ("option-contrast", "leak-adjusted"):
        assert get_metric(name).score(pass_).tolist() == [0.0] * 4
    assert get_metric("posterior-consensus").score(pass_)[2:].tolist() == [0.0, 0.0]


def test_agreement_of_posteriors() -> None:
    """1 among copies, 0 with an opposite, an outlier is lowest; trust picks the judges."""
    same = torch.tensor([[0.7, 0.3]] * 3)
    torch.testing.assert_close(agreement_of(same), torch.ones(3))
    opposite = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(agreement_of(opposite), torch.zeros(2))
    one_out = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
    even = agreement_of(one_out)
    assert int(even.argmin()) == 2 and bool((even[:2] > even[2]).all())
    trusted = agreement_of(one_out, torch.tensor([0.0, 0.0, 1.0]))
    assert float(trusted[2]) == 0.0 and float(trusted[1]) > float(trusted[0]) * 0.5
    p, q = one_out[0].double(), one_out[2].double()
    middle = (p + q) / 2
    jsd = 0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum()
    want = 1 - float(jsd) / math.log(2)
    assert float(trusted[0]) == pytest.approx(want, abs=1e-6)
    assert agreement_of(same[:1]).tolist() == [0.0]


def test_consensus_reads_what_states_no_answer(student: Student) -> None:
    """Two rationales with the same reasons agree fully, whatever one of them states between."""
    problem = make_problem(1, [12, 12], steps=3)
    first = problem.rationales[0]
    problem = replace(problem, rationales=(first, replace(first, teacher="t1")))
    problem = with_options(problem, ((0, 2), (0, 1, 2)), ((0, 2), (0, 1, 2)))
    pass_ = observe(student, [problem], options=True)
    score = get_metric("posterior-consensus").score(pass_)
    torch.testing.assert_close(score, torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_they_say_what_they_need(student: Student, name: str) -> None:
    """A batch without option leaves, and leaves kept from an earlier step."""
    metric = get_metric(name)
    assert metric.needs.options and not metric.needs.leaves
    with pytest.raises(ValueError, match="built with options=True, got no option leaves"):
        metric.score(observe(student, [make_problem(1, [5, 9])]))
    assert make_weigher("robust", **{metric.axis: name}).needs.options
    assert not make_weigher("robust").needs.options
    args = CompactConfig(output_dir="unused", leaf_every=4, overrides={metric.axis: name})
    with pytest.raises(ValueError, match="leaf_every must be 1 with metrics that read option"):
        CompactTrainer(model="no such model", args=args, train_dataset=None)
