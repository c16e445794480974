"""The leaf budget: which steps are asked about, and that the others change nothing."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact.data import load_problems
from compact.evaluation.score import score_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.metrics.gain import final_level, step_gains
from compact.passes.encode import choose_leaf_steps, encode_problem
from compact.passes.forward import observe
from compact.student import Student
from compact.weighting import make_weigher
from helpers.toy import make_model, make_problem
from helpers.trajectories import TEACHERS, rows_of, train


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(1, 4000),
    st.integers(1, 40),
    st.floats(0.01, 2.0),
)
def test_the_budget_holds_and_the_last_step_is_always_asked(
    counts: list[int], row: int, leaf: int, budget: float
) -> None:
    """At most the budget, or the last step of each rationale alone; distances are even."""
    chosen = choose_leaf_steps(counts, row=row, leaf=leaf, budget=budget)
    for n, steps in zip(counts, chosen, strict=True):
        assert steps[-1] == n - 1 and list(steps) == sorted(set(steps))
        gaps = [b - a for a, b in zip((-1, *steps), steps, strict=False)]
        assert max(gaps) - min(gaps) <= 1
    used = leaf * (1 + sum(map(len, chosen)))
    assert used <= budget * row or all(len(steps) == 1 for steps in chosen)
    if leaf * (1 + sum(counts)) <= budget * row:
        assert [len(steps) for steps in chosen] == counts


def test_the_order_of_the_teachers_does_not_matter() -> None:
    """A rationale gets the same steps wherever it stands."""
    counts = [3, 17, 8, 1, 17]
    chosen = choose_leaf_steps(counts, row=400, leaf=9, budget=0.25)
    turned = choose_leaf_steps(counts[::-1], row=400, leaf=9, budget=0.25)
    assert turned == chosen[::-1]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_levels_are_those_of_all_leaves(layout: str) -> None:
    """A leaf says the same whether its neighbours are asked or not."""
    student = Student.of(make_model("llama").eval())
    problem = make_problem(1, [12, 9], steps=4)
    few = replace(
        problem,
        rationales=tuple(
            replace(r, leaf_steps=steps)
            for r, steps in zip(problem.rationales, ((1, 3), (3,)), strict=True)
        ),
    )
    whole, part = (observe(student, [p], layout=layout) for p in (problem, few))
    assert part.batch.leaf_step.tolist() == [1, 3, 3, -1]
    torch.testing.assert_close(part.leaf_logp, whole.leaf_logp[[1, 3, 7, 8]], atol=1e-5, rtol=0)
    torch.testing.assert_close(final_level(part), final_level(whole), atol=1e-5, rtol=0)
    gains = step_gains(part)
    risen = gains.gain[:2].sum() - (gains.level[1] - gains.start[0])
    assert float(risen.abs()) < 1e-5


def test_training_says_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the steps with a leaf; kept levels go with them."""
    caplog.set_level(logging.INFO, logger="compact")
    rows = rows_of(*TEACHERS)
    weighed = {"preset": "robust", "leaf_every": 2, "max_steps": 4}
    losses, _ = train(tmp_path / "few", rows, **weighed, leaf_budget=0.05)
    assert "answer leaves: after 8 of" in caplog.text  # the last step of 4 x 2 that are read
    caplog.clear()
    train(tmp_path / "all", rows, **weighed, leaf_budget=100.0)
    assert "answer leaves" not in caplog.text
    assert all(loss == loss for loss in losses)


def test_a_step_without_a_leaf_has_no_gain() -> None:
    """The rows of `compact score` say which steps were asked about."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, seed=0, layers=1).eval(), tokenizer)
    problems = load_problems(zoo.make_rows(("good", "verbose"), 2, seed=1))
    rows = score_problems(student, tokenizer, problems, make_weigher("robust"), leaf_budget=0.01)
    for row in rows:
        gains = [step["gain"] for step in row["steps"]]
        assert gains[-1] is not None and set(gains[:-1]) <= {None}
    encoded = encode_problem(problems[0], tokenizer, max_length=400, leaf_budget=0.01)
    assert all(len(r.asked_steps) == 1 for r in encoded.rationales)
