"""Under autocast the head multiplies in its dtype, and adds in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting.consistency import consistency_loss
from helpers.toy import make_model, make_problem

OPS = (torch.ops.compact.linear_token_stats, torch.ops.compact.pairwise_symmetric_kl)


class Inputs(TorchDispatchMode):
    """Notes the dtypes of hidden states and weight of every call of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in OPS:
            self.seen.append((args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))


def student_of(trained: bool) -> Student:
    student = Student.of(make_model("llama").train())
    student.weight.requires_grad_(trained)
    return student


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_bfloat16_reaches_the_head(trained: bool) -> None:
    """Forward, answer leaves and consistency; loss and gradients stay those of float32."""
    student = student_of(trained)
    batch = build_batch([make_problem(1, [9, 12, 7])], layout="tree", leaves=True, pad_token_id=0)
    found = []
    for enabled in (False, True):
        student.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Inputs() as inputs:
            live, hidden, pass_ = run_pass(student, batch)
            term = consistency_loss(hidden, pass_, torch.full((3,), 1 / 3), "positions")
        (live.nll.mean() + term).backward()
        kind = torch.bfloat16 if enabled else torch.float32
        assert len(inputs.seen) >= 3 and set(inputs.seen) == {(kind, kind)}
        assert live.nll.dtype == pass_.leaf_logp.dtype == torch.float32
        grads = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
        found.append((live.nll.detach(), torch.cat(grads)))
    (nll, grad), (nll16, grad16) = found
    torch.testing.assert_close(nll16, nll, atol=5e-2, rtol=2e-2)
    assert (grad16 - grad).norm() < 0.05 * grad.norm()
    assert grad16.dtype == torch.float32


def test_the_copy_of_a_frozen_head_is_kept_until_it_changes() -> None:
    student, hidden = student_of(trained=False), torch.randn(3, 32)
    assert student.head_inputs(hidden)[1] is student.weight
    with torch.autocast("cpu", torch.bfloat16):
        first, again = (student.head_inputs(hidden)[1] for _ in range(2))
        assert first is again and torch.equal(first, student.weight.bfloat16())
        with torch.no_grad():
            student.weight.mul_(2.0)
        assert torch.equal(student.head_inputs(hidden)[1], student.weight.bfloat16())
