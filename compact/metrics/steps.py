"""Control: the number of reasoning steps, as COMPACT splits a rationale (`compact.text.steps`).

It counts as "higher is better".
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass


@register("steps", axis="control", aggregation="sum over steps; mean over rationales")
def steps(pass_: Pass) -> Tensor:
    """Returns [R] number of steps."""
    counts = [len(r.steps) for p in pass_.batch.problems for r in p.rationales]
    return torch.tensor(counts, dtype=torch.float32, device=pass_.batch.target.device)
