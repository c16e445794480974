"""Teacher weights: any problems, known properties of the result, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compact_ops import problem_weights, reference
from compact_ops.testing import check


def _inputs(sizes: list[int], seed: int, **options: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.randn(3, sum(sizes), generator=g, dtype=torch.float64),
        "offsets": torch.tensor([0, *sizes]).cumsum(0),
        "beta": torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64),
        "prior_std": torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64),
        **options,
    }


@given(
    st.lists(st.integers(1, 9), max_size=6),
    st.integers(0, 99),
    st.sampled_from([0.3, 1.0, 5.0]),
    st.integers(0, 1),
    st.sampled_from([0.0, 1e-6]),
    st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_problems(
    sizes: list[int], seed: int, tau: float, ddof: int, eps: float, floor: float
) -> None:
    """No problem, one rationale, both denominators, every share of the floor."""
    inputs = _inputs(sizes, seed, tau=tau, ddof=ddof, eps=eps, floor=floor)
    found = check("problem_weights", inputs)["weight"]
    for begin, end in zip(inputs["offsets"][:-1], inputs["offsets"][1:], strict=True):
        assert float(found[begin:end].sum()) == pytest.approx(1, abs=1e-6)
        assert float(found[begin:end].min()) >= floor / int(end - begin) - 1e-7


def test_known_cases() -> None:
    """One rationale weighs 1; equal scores share; the better score weighs more by exp(z / tau)."""
    offsets, one = torch.tensor([0, 1, 4, 6]), torch.ones(1, dtype=torch.float64)
    scores = torch.tensor([[7.0, 2.0, 2.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
    found, z = problem_weights(scores, offsets, one, 0 * one, tau=0.5)
    assert float(found[0]) == 1
    torch.testing.assert_close(found[1:4], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert float(found[5] / found[4]) == pytest.approx(torch.e ** (2 / 0.5))
    assert z.tolist() == [[0, 0, 0, 0, -1, 1]]


@pytest.mark.parametrize("function", [problem_weights, reference.problem_weights])
def test_equal_scores_differ_from_their_rounded_mean(function: Any) -> None:
    """z is 0, and a NaN among equal scores is seen."""
    scores = torch.full((2, 7), 0.1, dtype=torch.float64)
    scores[1, 4] = torch.nan
    assert float(scores[0].mean()) != 0.1
    found = function(scores, torch.tensor([0, 7]), torch.ones(2), torch.zeros(2))
    assert not bool(found.zscores[0].any())
    assert bool(found.zscores[1].isnan().all()) and bool(found.weight.isnan().all())


def test_a_score_that_is_nan_is_seen() -> None:
    """It makes the weights and z-scores of its problem NaN, and no others."""
    inputs = _inputs([2, 3], 0)
    inputs["scores"][1, 3] = torch.nan
    for found in (problem_weights(**inputs), reference.problem_weights(**inputs)):
        assert found.weight.isnan().tolist() == [False] * 2 + [True] * 3
        assert found.zscores.isnan().nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]


def test_ranking_survives_units() -> None:
    """Without a prior, a score in other units gives the same weights."""
    inputs = _inputs([4, 3], 5) | {"prior_std": torch.zeros(3, dtype=torch.float64)}
    scaled = inputs | {"scores": inputs["scores"] * 1000 + 7}
    for ours, theirs in zip(problem_weights(**scaled), problem_weights(**inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"scores": torch.zeros(4)}, ValueError, r"scores must have shape \[S, R\]"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must have dtype int64 or int32"),
        ({"beta": torch.zeros(2)}, ValueError, r"beta must have shape \[S\] = \[3\]"),
        ({"prior_std": torch.zeros(4)}, ValueError, r"prior_std must have shape \[S\] = \[3\]"),
        ({"tau": 0.0}, ValueError, "tau must be > 0"),
        ({"ddof": -1}, ValueError, "ddof must be >= 0"),
        ({"ddof": 0.5}, TypeError, "ddof must be an integer"),
        ({"tau": torch.inf}, ValueError, "tau must be > 0 and finite"),
        ({"eps": -1e-6}, ValueError, "eps must be >= 0"),
        ({"floor": 1.5}, ValueError, "floor must be <= 1"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    with pytest.raises(error, match=f"^problem_weights: {message}.*got"):
        problem_weights(**_inputs([2, 3], 0) | change)


def test_offsets_that_do_not_fit() -> None:
    """Offsets beyond the scores, or of an empty problem, raise an error."""
    for offsets in ([0, 2, 6], [0, 3, 3, 5]):
        with pytest.raises((ValueError, RuntimeError), match="offsets"):
            problem_weights(**_inputs([2, 3], 0) | {"offsets": torch.tensor(offsets)})
