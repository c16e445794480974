"""Consensus as agreement in numbers with teachers who fit the gold answer, and grounded arithmetic.

C_k = sum_{j != k} w_j s(k, j) / sum_{j != k} w_j + g_k, w = softmax_k(I^k_n) with I^k_n the mean
log-likelihood of the gold answer after rationale k. s is the Jaccard index of the sets of numbers
before the answer marker; where neither rationale holds a number, the cosine of their hidden states
at the end of the last step. g_k is the share of the rationale's equations that are grounded: the
arithmetic holds, and every operand stands in the question or is the result of a grounded equation
before it (1 without equations). Source: this project. Hidden states hardly notice one wrong
number, the numbers do; the gold answer keeps a wrong majority from winning; grounding needs no
majority.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compact.equations import equations, numbers
from compact.metrics import register
from compact.metrics.gold_weighted import gold_weights
from compact.passes import EncodedProblem, Pass


def grounded_share(prompt: str, steps: Sequence[str]) -> float:
    """Returns the share of equations that hold and use known numbers only; 1 without equations."""
    known = set(numbers(prompt))
    count = grounded = 0
    for step in steps:
        for equation in equations(step):
            count += 1
            if equation.holds and known.issuperset(equation.operands):
                grounded += 1
                known.add(equation.result)
    return grounded / count if count else 1.0


def _similarities(problem: EncodedProblem, states: Tensor) -> Tensor:
    """Returns [K, K] s(k, j) in 0..1, 1 on the diagonal."""
    found = [
        frozenset(number for step in r.step_texts for number in numbers(step))
        for r in problem.rationales
    ]
    similar = (states @ states.T).clamp(min=0.0)
    for k, mine in enumerate(found):
        for j, other in enumerate(found):
            if mine or other:
                similar[k, j] = len(mine & other) / len(mine | other)
    return similar.fill_diagonal_(1.0)


@register("agreement", axis="consensus", needs_probes=True)
def agreement(pass_: Pass) -> Tensor:
    """Returns [R] agreement + grounded share, in 0..2."""
    batch = pass_.batch
    ends = torch.tensor([r.steps[-1][1] - 1 for p in batch.problems for r in p.rationales])
    rows = batch.token_rows[batch.token_offsets[:-1] + ends.to(batch.token_rows.device)]
    states = torch.nn.functional.normalize(pass_.hidden.flatten(0, 1)[rows].float(), dim=1).cpu()
    sizes = batch.problem_offsets.diff().tolist()
    weights = gold_weights(pass_).cpu().split(sizes)
    scores = []
    for problem, mine, w in zip(batch.problems, states.split(sizes), weights, strict=True):
        others = w.repeat(len(w), 1).fill_diagonal_(0.0)
        total = others.sum(dim=1)
        agree = (others * _similarities(problem, mine)).sum(dim=1)
        agree = torch.where(total > 0, agree / total.clamp(min=1e-30), 1.0)
        grounded = [grounded_share(problem.prompt, r.step_texts) for r in problem.rationales]
        scores.append(agree + torch.tensor(grounded))
    return torch.cat(scores).to(pass_.hidden.device)
