"""Consensus as the vote of final answers.

C_k = the share of the problem's K rationales (k included) with the same normalised final answer as
k. A rationale without an answer agrees only with itself. Source: self-consistency (Wang et
al., arXiv 2203.11171), over teachers instead of samples.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from compact.metrics import register
from compact.passes import Batch, EncodedProblem, Pass
from compact.passes.transfer import put


def votes(problem: EncodedProblem) -> list[int]:
    """Returns [K] how many of the problem's rationales have the final answer of each."""
    counts = Counter(r.answer for r in problem.rationales)
    return [1 if r.answer is None else counts[r.answer] for r in problem.rationales]


def answer_share(batch: Batch) -> Tensor:
    """Returns [R] float32, the share of the problem's K rationales with this final answer."""
    shares = [count / len(p.rationales) for p in batch.problems for count in votes(p)]
    return put(shares, batch.problem)


@register("answer", axis="consensus")
def answer(pass_: Pass) -> Tensor:
    """Returns [R] share of rationales with the same final answer."""
    return answer_share(pass_.batch)
