"""Passes over problems of random tokens with chosen losses, without running a student."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from compact.passes import EncodedProblem, Pass
from compact.passes.packing import build_batch
from compact_ops import TokenStats


def pass_of(problems: Sequence[EncodedProblem], losses: Sequence[float] | None = None) -> Pass:
    """A pass whose tokens have the loss of their rationale (1 without `losses`)."""
    batch = build_batch(problems, layout="tree", leaves=False, pad_token_id=0)
    each = torch.ones(batch.num_rationales) if losses is None else torch.tensor(losses)
    nll = each[batch.rationale]
    stats = TokenStats(nll, nll, torch.ones_like(nll), nll < 1.0, None, None)
    student: Any = SimpleNamespace(model=SimpleNamespace(training=True))
    states = torch.zeros(*batch.main.input_ids.shape, 4)
    return Pass(batch, student, states, None, stats, torch.zeros(0))
