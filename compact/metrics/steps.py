"""Control: the number of reasoning steps, as COMPACT splits a rationale (`compact.text.steps`).

It counts as "higher is better".
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.transfer import put


@register("steps", axis="control", aggregation="sum over steps; mean over rationales")
def steps(pass_: Pass) -> Tensor:
    """Returns [R] number of steps."""
    counts = [len(r.steps) for p in pass_.batch.problems for r in p.rationales]
    return put(counts, pass_.batch.target)
