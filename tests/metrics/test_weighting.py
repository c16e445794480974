"""Properties of every way to weigh: sums, permutations, copies, and what must not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compact.data import load_problems
from compact.encode import encode_problem
from compact.forward import run_pass
from compact.metrics import get_metric
from compact.packing import build_batch
from compact.passes import EncodedProblem, Pass
from compact.student import Student
from compact.weighting import make_weigher
from compact.zoo import TEACHERS, make_rows, with_filler
from compact.zoo_student import build_model, build_tokenizer
from toy import make_model, make_problem

_STUDENT = replace(Student.of(make_model("llama").eval()), thinking_ids=torch.tensor([3, 11, 40]))
WEIGHERS = ("released", "paper", "robust", "uniform", "random", "softmax-nll", "ca-mkd", "ebkd")


def pass_of(problems: list[EncodedProblem], name: str) -> Pass:
    """A pass in the layout and with the leaves that a weigher asks for."""
    weigher = make_weigher(name)
    layout = "padded" if weigher.needs_padded else "tree"
    batch = build_batch(problems, layout=layout, probes=weigher.needs_probes, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def weights(problems: list[EncodedProblem], name: str) -> torch.Tensor:
    """The weights of a fresh weigher."""
    return make_weigher(name)(pass_of(problems, name)).weight


@pytest.mark.parametrize("name", WEIGHERS)
def test_weights_sum_to_one_and_one_teacher_has_all(name: str) -> None:
    """K = 1, 3 and 4 in one pass."""
    problems = [make_problem(1, [9]), make_problem(2, [5, 9, 7]), make_problem(3, [6, 6, 8, 10])]
    found = weights(problems, name)
    assert bool((found >= 0).all())
    assert float(found[0]) == pytest.approx(1)
    assert float(found[1:4].sum()) == pytest.approx(1)
    assert float(found[4:].sum()) == pytest.approx(1)


# `random` draws by place; `paper` breaks ties between heaviest paths by the order of the teachers.
@pytest.mark.parametrize("name", [w for w in WEIGHERS if w not in ("random", "paper")])
def test_permuting_teachers_permutes_weights(name: str) -> None:
    """Who stands first is of no importance."""
    problem = make_problem(4, [6, 9, 12, 7])
    order = [2, 0, 3, 1]
    shuffled = replace(problem, rationales=tuple(problem.rationales[i] for i in order))
    torch.testing.assert_close(
        weights([shuffled], name), weights([problem], name)[order], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", [w for w in WEIGHERS if w != "random"])
def test_identical_rationales_weigh_the_same(name: str) -> None:
    """Three copies, each a third."""
    problem = make_problem(5, [8])
    copies = replace(problem, rationales=problem.rationales * 3)
    torch.testing.assert_close(weights([copies], name), torch.full((3,), 1 / 3), rtol=0, atol=2e-3)


def test_a_score_that_is_not_finite_is_named() -> None:
    """An unusable weight raises with metric, question and teacher; it never falls back."""
    weigher = make_weigher("robust")
    found = pass_of([make_problem(6, [6, 8])], "robust")
    found.leaf_logp[:] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got nan.*"):
        weigher(found)


def test_running_spread_softens_noise() -> None:
    """Pure noise: `robust`, which knows the running spread, is less sure of it than `released`."""
    weigher = make_weigher("robust")
    g = torch.Generator().manual_seed(0)
    offsets = torch.arange(0, 4 * 200 + 1, 4)
    scores = {axis: torch.randn(800, generator=g) for axis in weigher.metrics}
    weigher.update(scores, offsets)
    effective = {}
    for name, one in (("robust", weigher), ("released", make_weigher("released"))):
        weight = one.weigh(scores, offsets).weight.view(-1, 4)
        effective[name] = float((1 / weight.square().sum(dim=1)).mean())
    assert effective["robust"] > effective["released"] + 0.1, effective


def test_filler_raises_released_adaptability() -> None:
    """Ten lines of filler around the same steps: longer is better to it, which is its weakness."""
    import random

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
        problems, layout="padded", probes=False, pad_token_id=tokenizer.pad_token_id
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
    batch = build_batch(problems, layout="tree", probes=False, pad_token_id=0)
    with torch.no_grad():
        score = get_metric("answer").score(run_pass(student, batch)[2]).view(-1, 3)
    assert float((score[:, 0] < score[:, 1]).float().mean()) > 0.5
