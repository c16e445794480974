"""Control: a uniform draw that depends on the question and the teacher only.

It shows how far from chance a table can be by chance. Its direction means nothing.
"""

from __future__ import annotations

from random import Random

from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.transfer import put


@register("random", axis="control")
def random(pass_: Pass) -> Tensor:
    """Returns [R] draws from [0, 1)."""
    draws = [
        Random(f"{problem.question_id}/{rationale.teacher}").random()
        for problem in pass_.batch.problems
        for rationale in problem.rationales
    ]
    return put(draws, pass_.batch.target)
