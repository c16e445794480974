"""Validity as the judgement of the texts: stated answers, arithmetic, numbers from nowhere.

V_k = v_k of `compact.validity.judge`, in 0..1. It multiplies the weight. It uses the gold answer
where there is one, else a vote. The judgements are made
when the data are encoded (`encode_problems`), from all problems at once. In a pass whose rationales
have none, every problem is judged by itself. Source: this project.
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.transfer import put
from compact.validity import Judgement, judge


def judgements(pass_: Pass) -> list[Judgement]:
    """Returns the R judgements of the rationales of a pass; cached in the pass."""
    if "judgements" not in pass_.cache:
        found: list[Judgement] = []
        for problem in pass_.batch.problems:
            known = [r.judgement for r in problem.rationales if r.judgement is not None]
            complete = len(known) == len(problem.rationales)
            found += known if complete else judge([problem])[0]
        pass_.cache["judgements"] = found
    return pass_.cache["judgements"]  # type: ignore[return-value]


@register("judged", axis="validity", needs_judgements=True)
def judged(pass_: Pass) -> Tensor:
    """Returns [R] v_k in 0..1."""
    values = [judgement.validity for judgement in judgements(pass_)]
    return put(values, pass_.hidden)
