"""The validity of each rationale, how likely it is to be right, from its own and others' texts.

v_k = (q' + (q_k - q') exp(-sum of the evidence of the checks against k)) / copies_k

q_k is how likely its stated answer is (`votes`: 1 or 0 where the gold answer is known), q' that of
the next less likely answer of the problem (0 if there is none), and copies_k the number of its
rationales with the same text. So checks (`checks`) order the rationales of one answer, but never
put one below those of a less likely answer: without a gold answer, a check that misreads a text
would otherwise overrule the vote. (Measured without q': below the plain vote by up to .09 of AUC.)

With a gold answer, a rationale of which no answer could be read has q_k = `UNREAD`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compact.validity.agreement import agreement, document_frequencies
from compact.validity.cases import Case, shares
from compact.validity.checks import CHECKS, Outcomes, base_rates, check, evidence
from compact.validity.votes import answer_probabilities, learn_weights

UNREAD = 0.2
"""q_k of a rationale without a readable answer where the gold answer is known."""

Basis = Literal["gold", "vote", "nothing"]


@dataclass(frozen=True)
class Finding:
    """Something that speaks against a rationale, in words that a person can check.

    Attributes:
        kind: "answer" (states another answer than the gold one), "vote" (than the likeliest one),
            "unread" (no answer was read), "arithmetic", "numbers" or "copy".
        step: index of the step, None if it is about the whole rationale.
        text: the words.
    """

    kind: str
    step: int | None
    text: str


@dataclass(frozen=True)
class Judgement:
    """What the texts say about one rationale.

    Attributes:
        validity: v_k in 0..1; its ratios within a problem count.
        agreement: C_k in 0..1, how far it agrees with the others that count.
        basis: what its answer was judged by: "gold", "vote", or "nothing" if no gold answer is
            known and no two rationales state the same answer.
        findings: what speaks against it.
    """

    validity: float
    agreement: float
    basis: Basis
    findings: tuple[Finding, ...]


def judge(cases: Sequence[Case]) -> list[tuple[Judgement, ...]]:
    """Judges every rationale of every problem.

    Args:
        cases: all problems of the data: what teachers and checks are worth is learned from them.

    Returns:
        One judgement per rationale of each problem.
    """
    weight = learn_weights(cases)
    likely = [answer_probabilities(case, weight) for case in cases]
    witnesses = [
        [q * share for q, share in zip(of_case, shares(case), strict=True)]
        if any(of_case)
        else shares(case)
        for case, of_case in zip(cases, likely, strict=True)
    ]
    outcomes = [check(case, w) for case, w in zip(cases, witnesses, strict=True)]
    rates = base_rates(
        pair
        for of_case, w in zip(outcomes, witnesses, strict=True)
        for pair in zip(of_case, w, strict=True)
    )
    frequencies = document_frequencies(cases)
    return [
        _judgements(case, q, of_case, rates, agreement(case, w, frequencies))
        for case, q, of_case, w in zip(cases, likely, outcomes, witnesses, strict=True)
    ]


def _judgements(
    case: Case,
    likely: Sequence[float],
    outcomes: Sequence[Outcomes],
    rates: Mapping[str, float],
    agreed: Sequence[float],
) -> tuple[Judgement, ...]:
    """Returns the judgements of one problem."""
    answers = [r.answer for r in case.rationales]
    stated = [answer for answer in answers if answer is not None]
    basis: Basis = "vote" if len(set(stated)) < len(stated) else "nothing"
    if case.gold is not None:
        basis = "gold"
        likely = [UNREAD if a is None else q for q, a in zip(likely, answers, strict=True)]
    # A tie has no likeliest answer: nobody is told to differ from it.
    top = max(likely)
    leaders = {a for a, q in zip(answers, likely, strict=True) if q == top}
    leading = leaders.pop() if basis == "vote" and len(leaders) == 1 else None
    judgements = []
    for k, share in enumerate(shares(case)):
        against = evidence(outcomes[k], rates)
        lower = max((q for q in likely if q < likely[k]), default=0.0)
        kept = math.exp(-sum(against.values()))
        findings = _about_the_answer(answers[k], likely[k], case.gold, leading)
        findings += [
            Finding(name, step, text)
            for name in CHECKS
            if against[name] > 0
            for step, text in outcomes[k][name].failures
        ]
        if share < 1.0:
            findings.append(Finding("copy", None, f"{round(1 / share)} rationales have this text"))
        validity = share * (lower + (likely[k] - lower) * kept)
        judgements.append(Judgement(validity, agreed[k], basis, tuple(findings)))
    return tuple(judgements)


def _about_the_answer(
    answer: str | None, likely: float, gold: str | None, leading: str | None
) -> list[Finding]:
    if answer is None:
        return [Finding("unread", None, "no final answer was read")]
    if gold is not None and likely == 0.0:
        return [Finding("answer", None, f"states {answer}, the gold answer is {gold}")]
    if leading is not None and answer != leading:
        return [Finding("vote", None, f"states {answer}, the likeliest answer is {leading}")]
    return []
