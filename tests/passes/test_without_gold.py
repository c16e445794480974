"""A batch may mix problems with and without a gold answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compact.metrics import CONTROL, METRICS, get_metric
from compact.metrics.gain import step_gains
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import observe
from compact.passes.packing import Layout
from compact.student import Student
from compact.weighting import make_weigher
from helpers.toy import ThinkingWords, make_model, make_problem

KNOWN, OTHER = make_problem(1, [6, 9, 4]), make_problem(2, [5, 7])


def without_gold(problem: EncodedProblem) -> EncodedProblem:
    """The problem as `encode_problem` gives it if the data have no answer."""
    bare = tuple(replace(r, leaf_steps=(), answer="7") for r in problem.rationales)
    none = dict.fromkeys(("gold_ids", "cue_ids", "spaced_cue_ids", "raw_gold_ids"), ())
    return replace(problem, gold=None, rationales=bare, **none)


UNKNOWN = without_gold(make_problem(3, [8, 3, 5]))
LEAST = without_gold(make_problem(4, [4, 6]))


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.of(make_model("llama").eval(), ThinkingWords(3, 11, 40))


def columns(pass_: Pass, problem: int) -> dict[str, torch.Tensor]:
    """The results of one problem of a pass."""
    batch, gains = pass_.batch, step_gains(pass_)
    first, end = batch.problem_offsets[problem : problem + 2].tolist()
    tokens = slice(*batch.token_offsets[[first, end]].tolist())
    steps = slice(*gains.offsets[[first, end]].tolist())
    assert pass_.stats.gold_logit is not None and pass_.stats.gold_logp is not None
    # Metrics of optional statistics, and one whose pool is the pass, depend on more than a problem.
    found = {
        name: m.score(pass_)[first:end]
        for name, m in METRICS.items()
        if not (m.needs.padded or m.needs.options or m.needs.statistics or name == "aslec-casl")
    }
    return found | {
        "nll": pass_.stats.nll[tokens],
        "gold_logit": pass_.stats.gold_logit[tokens],
        "gold_logp": pass_.stats.gold_logp[tokens],
        "level": gains.level[steps],
        "start": gains.start[first:end],
    }


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_problem_is_scored_as_if_it_were_alone(student: Student, layout: Layout) -> None:
    problems = [UNKNOWN, KNOWN, LEAST, OTHER]
    mixed = observe(student, problems, layout=layout)
    assert (mixed.batch.question_leaf >= 0).tolist() == [False, True, False, True]
    for p, problem in enumerate(problems):
        alone = columns(observe(student, [problem], layout=layout), 0)
        for name, values in columns(mixed, p).items():
            torch.testing.assert_close(values, alone[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("problems", [[UNKNOWN], [LEAST, UNKNOWN], [KNOWN, UNKNOWN]])
def test_metrics_that_need_gold_score_0_without_it(
    student: Student, problems: list[EncodedProblem]
) -> None:
    tree = observe(student, problems)
    padded = observe(student, problems, layout="padded", leaves=False)
    mine = slice(-3, None)
    for name, metric in METRICS.items():
        if metric.needs.statistics or metric.needs.options or metric.axis == CONTROL:
            continue
        score = metric.score(padded if metric.needs.padded else tree)
        assert bool(torch.isfinite(score).all()), name
        assert metric.needs.gold == (not score[mine].any()), name
    assert not tree.stats.gold_logp[-16:].any()
    assert step_gains(tree).offsets[-4:].diff().tolist() == [0, 0, 0]


def test_the_vote_counts_without_gold(student: Student) -> None:
    """Without a gold answer the answer of most is the likeliest."""
    texts = ["2 + 3 = 5", "2 + 3 = 5", "2 + 4 = 6"]
    answers = ["5", "5", "6"]
    rationales = tuple(
        replace(r, step_texts=(text, ""), answer=answer)
        for r, text, answer in zip(UNKNOWN.rationales, texts, answers, strict=True)
    )
    problem = replace(UNKNOWN, prompt="2 and 3", rationales=rationales)
    pass_ = observe(student, [problem])
    score = get_metric("judged").score(pass_)
    assert score[0] == score[1] > score[2]


def test_rejection_leaves_out_what_it_cannot_judge(student: Student) -> None:
    silent = replace(UNKNOWN, rationales=tuple(replace(r, answer=None) for r in UNKNOWN.rationales))
    right = replace(
        KNOWN, gold="7", rationales=tuple(replace(r, answer="7") for r in KNOWN.rationales)
    )
    pass_ = observe(student, [silent, right, UNKNOWN])
    weight = make_weigher("rejection")(pass_).weight
    torch.testing.assert_close(weight, torch.tensor([0.0] * 3 + [1 / 3] * 3 + [0.0] * 3))
    told = make_weigher("oracle", teachers=["t1"])
    assert told.gold_readers == () and told(pass_).weight[1] == 1
