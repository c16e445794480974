"""`rsr`: the rank-surprisal ratio against its formula, from the logits of the student."""

from __future__ import annotations

import pytest
import torch

from compact.metrics import get_metric
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact_ops import TokenStats
from helpers.toy import make_model, make_problem

_STUDENT = Student.of(make_model("llama").eval())


def test_rsr_equals_its_formula() -> None:
    """Ranks and surprisals of every token, from a plain forward over each rationale."""
    problem = make_problem(3, [5, 9, 7])
    batch = build_batch([problem], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        pass_ = run_pass(_STUDENT, batch, statistics=("rank",))[2]
        want = []
        for rationale in problem.rationales:
            ids = torch.tensor([[*problem.prompt_ids, *rationale.ids]])
            logits = _STUDENT.model(input_ids=ids).logits[0, len(problem.prompt_ids) - 1 : -1]
            own = logits.gather(1, ids[0, len(problem.prompt_ids) :, None])
            rank = 1 + (logits > own).sum(1)
            surprisal = logits.logsumexp(1) - own[:, 0]
            want.append(float(rank.clamp(max=100).sum() / surprisal.sum()))
    assert get_metric("rsr").score(pass_).tolist() == pytest.approx(want, rel=1e-4)


def test_golden_value() -> None:
    """Ranks are capped at 100; a rationale known by heart has a finite score."""
    batch = build_batch([make_problem(0, [3, 2])], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        pass_ = run_pass(_STUDENT, batch)[2]
    nll, rank = torch.tensor([0.5, 2.0, 7.5, 0.0, 0.0]), torch.tensor([1, 3, 4096, 1, 1])
    pass_.stats = TokenStats(nll, nll, nll, rank == 1, None, None, rank=rank.int())
    score = get_metric("rsr").score(pass_)
    assert float(score[0]) == pytest.approx((1 + 3 + 100) / 10)
    assert bool(torch.isfinite(score).all())
