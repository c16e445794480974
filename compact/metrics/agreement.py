"""Consensus as agreement with the rationales that count, in numbers and words.

C_k of `compact.validity.agreement`, in 0..1: the mean similarity to the problem's other rationales,
each weighted by how likely its answer is. It uses the gold answer where there is one: a wrong
majority then counts for nothing. Without one it orders the rationales of one answer only: the
values of every answer have the same mean. It is read from the texts, not from the student, for two
reasons. One wrong number hardly changes hidden states. And a student that cannot add yet trusts two
teachers with the same error too much (zoo B, early: weight .54 on the right one, .97 by the text).
Source: this project.
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import register
from compact.metrics.judged import judgements
from compact.passes import Pass
from compact.passes.transfer import put


@register("agreement", axis="consensus", needs_judgements=True)
def agreement(pass_: Pass) -> Tensor:
    """Returns [R] C_k in 0..1."""
    values = [judgement.agreement for judgement in judgements(pass_)]
    return put(values, pass_.hidden)
