"""`hsic-linear`: the O(n d) form against the n x n definition of HSIC."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from compact.metrics import get_metric
from compact.metrics.hsic import linear_hsic
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from helpers.toy import make_model, make_problem

_STUDENT = Student.of(make_model("llama").eval())


def exact(states: torch.Tensor, level: torch.Tensor) -> float:
    """tr(K H L H) / n^2 with the Gram matrices written out."""
    n = len(states)
    centring = torch.eye(n, dtype=states.dtype) - 1.0 / n
    gram, levels = states @ states.T, level[:, None] * level[None, :]
    return float(torch.trace(gram @ centring @ levels @ centring)) / n**2


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 999))
def test_linear_form_is_exact(sizes: list[int], width: int, seed: int) -> None:
    """Segments of any size, one position included (which depends on nothing)."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(sizes), width, generator=g, dtype=torch.float64)
    level = torch.randn(sum(sizes), generator=g, dtype=torch.float64)
    found = linear_hsic(states, level, torch.tensor([0, *sizes]).cumsum(0))
    wanted = [exact(*pair) for pair in zip(states.split(sizes), level.split(sizes), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_it_sees_dependence_and_nothing_else() -> None:
    """A level that follows the states scores high; a constant one scores 0."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(50, 3, generator=g, dtype=torch.float64)
    noise = torch.randn(50, generator=g, dtype=torch.float64)
    offsets = torch.tensor([0, 50])
    follows = linear_hsic(states, states[:, 0], offsets)
    assert float(follows) > 10 * float(linear_hsic(states, noise, offsets))
    assert float(linear_hsic(states, torch.ones_like(noise), offsets)) == pytest.approx(
        0, abs=1e-20
    )


def test_metric_reads_the_rows_that_predict_the_completion() -> None:
    """The registered metric is the exact form on unit hidden states and the gold likelihood."""
    batch = build_batch([make_problem(1, [6, 9])], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        found = run_pass(_STUDENT, batch)[2]
    states = torch.nn.functional.normalize(found.hidden.flatten(0, 1)[batch.rows].double(), dim=1)
    assert found.stats.gold_logp is not None
    level = found.stats.gold_logp.double()
    wanted = [exact(states[:6], level[:6]), exact(states[6:], level[6:])]
    score = get_metric("hsic-linear").score(found)
    torch.testing.assert_close(score, torch.tensor(wanted, dtype=torch.float64))
