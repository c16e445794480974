"""A step that is left out changes nothing, with the loss scaler of fp16 too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from compact.trainer import step
from compact.trainer.step import LeftOutSteps, Micro, OpenStep


@pytest.mark.parametrize("with_scaler", [True, False])
def test_a_step_that_is_left_out(with_scaler: bool) -> None:
    """Between two steps that count: no error, no change, the same scale."""
    Accelerator(cpu=True)  # the optimizer reads its state
    model = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu") if with_scaler else None
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = AcceleratedOptimizer(momentum, device_placement=False, scaler=scaler)
    steps = LeftOutSteps()
    for left_out in (False, True, True, False):
        before = model.weight.detach().clone()
        loss = model(torch.ones(1, 2)).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if left_out:
            steps.leave_out(model, optimizer)
        if scaler is not None:
            scaler.unscale_(momentum)  # as when gradients are clipped
        optimizer.step()
        steps.on_optimizer_step(None, None, None)
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == left_out
        assert optimizer.scaler is scaler
        assert scaler is None or scaler.get_scale() == 65536.0


def test_the_loss_of_the_log() -> None:
    """As it is, as a mean over fewer problems, repeated; 0 if there was none."""
    open_step, logged = OpenStep(), []
    for factor in (None, 1.0, None, 2.0, None, None):
        for _ in range(2):
            open_step.add_loss(torch.tensor(1.5))
        logged.append(3.0 + float(open_step.correct_loss(factor)))
    assert logged == [0.0, 3.0, 3.0, 6.0, 6.0, 6.0]


def test_a_score_that_is_not_finite_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that found it takes part in the exchange, in which the others wait."""

    class Broken(Micro):
        def records(self) -> list[Any]:
            raise ValueError("validity score mine must be finite")

    asked = []
    monkeypatch.setattr(step, "gather_object", lambda found: (asked.append(found), found)[1])
    with pytest.raises(ValueError, match="score mine must be finite"):
        OpenStep([Broken()]).close(None, alone=False)
    assert len(asked) == 1
    with pytest.raises(ValueError, match="score mine must be finite"):
        OpenStep([Broken()]).close(None, alone=True)
    assert len(asked) == 1
