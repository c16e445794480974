"""Consensus as agreement in numbers with trustworthy teachers, and grounded arithmetic.

C_k = sum_j t_j s(k, j) / sum_j t_j + g_k.

t_j is the trust in rationale j: 1 if its stated answer is the gold answer, 0 if it is another one.
If it states none, t_j = exp(I^j_n), the student's mean likelihood of a token of the gold answer
after j. If every t_j is 0, or there is no gold answer, all are set to 1.

s(k, j) is the Jaccard index of the sets of numbers in the steps and the stated answer (some
teachers write a result only in the answer: "594 / 3 = ? The answer is 198"). If neither rationale
has a number, s is the cosine of their hidden states at the end of the last step.

g_k is the share of the rationale's equations that are grounded, 1 without equations. An equation is
grounded if its arithmetic holds and every operand is in the question or is the result of an earlier
grounded equation. Source: this project.

Reasons: one wrong number hardly changes hidden states, but it changes the set of numbers. Grounding
needs no majority. Trust in the gold answer prevents a wrong majority from winning. Trust is read
from the text, not from the student's likelihoods as in `gold-weighted`, for two reasons. A student
that cannot add yet trusts two teachers with the same error too much (zoo B, early: weight .54 on
the right one instead of .97). And consensus stays independent of adaptability, so that their
correlation measures the reliability of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compact.metrics import register
from compact.metrics.gain import final_level
from compact.passes import EncodedProblem, Pass
from compact.text.equations import equations, numbers


def grounded_share(prompt: str, steps: Sequence[str]) -> float:
    """Returns the share of equations that are grounded; 1 without equations."""
    known = set(numbers(prompt))
    count = grounded = 0
    for step in steps:
        for equation in equations(step):
            count += 1
            if equation.holds and known.issuperset(equation.operands):
                grounded += 1
                known.update(equation.right)
    return grounded / count if count else 1.0


def _similarities(problem: EncodedProblem, states: Tensor) -> Tensor:
    """Returns [K, K] s(k, j) in 0..1, 1 on the diagonal."""
    found = [
        frozenset(number for text in (*r.step_texts, r.answer or "") for number in numbers(text))
        for r in problem.rationales
    ]
    similar = (states @ states.T).clamp(min=0.0)
    for k, mine in enumerate(found):
        for j, other in enumerate(found):
            if mine or other:
                similar[k, j] = len(mine & other) / len(mine | other)
    return similar.fill_diagonal_(1.0)


def _trust(problem: EncodedProblem, level: Tensor) -> Tensor:
    """Returns [K] t_j; `level` [K] is I_n, nats."""
    if problem.gold is None:
        return torch.ones_like(level)
    trust = torch.tensor(
        [
            float(likelihood if r.answer is None else r.answer == problem.gold)
            for r, likelihood in zip(problem.rationales, level.exp(), strict=True)
        ]
    )
    return trust if bool(trust.any()) else torch.ones_like(trust)


@register("agreement", axis="consensus", needs_leaves=True)
def agreement(pass_: Pass) -> Tensor:
    """Returns [R] agreement + grounded share, in 0..2."""
    batch = pass_.batch
    ends = torch.tensor([r.steps[-1][1] - 1 for p in batch.problems for r in p.rationales])
    rows = batch.token_rows[batch.token_offsets[:-1] + ends.to(batch.token_rows.device)]
    states = torch.nn.functional.normalize(pass_.hidden.flatten(0, 1)[rows].float(), dim=1).cpu()
    sizes = batch.problem_offsets.diff().tolist()
    levels = final_level(pass_).cpu().split(sizes)
    scores = []
    for problem, mine, level in zip(batch.problems, states.split(sizes), levels, strict=True):
        trust = _trust(problem, level)
        agree = _similarities(problem, mine) @ trust / trust.sum()
        grounded = [grounded_share(problem.prompt, r.step_texts) for r in problem.rationales]
        scores.append(agree + torch.tensor(grounded))
    return torch.cat(scores).to(pass_.hidden.device)
