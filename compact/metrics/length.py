"""Control: the number of completion tokens, end-of-turn token included.

In one public comparison with four teachers, length ranked the teachers better than every
likelihood. A metric that does not beat it has measured length. It counts as "higher is better".
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import register
from compact.passes import Pass


@register(
    "length",
    axis="control",
    needs_student=False,
    aggregation="sum over tokens; mean over rationales",
)
def length(pass_: Pass) -> Tensor:
    """Returns [R] number of tokens."""
    return pass_.batch.token_offsets.diff().float()
