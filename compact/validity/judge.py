"""The validity of each rationale, how likely it is to be right, from its own and others' texts.

v_k = (q' + (q_k - q') c_k / max c) / copies_k,    c_k = exp(-sum of the evidence of the checks)

q_k is how likely its stated answer is (`votes`: 1 or 0 where the gold answer is known), q' that of
the next less likely answer of the problem (0 if there is none), max c the largest c of the
rationales that state the same answer, and copies_k the number of rationales with the same text.
Copies also share one vote, unless their text is a single statement (`cases.own_votes`).

So checks (`checks`) order the rationales of one answer: without a gold answer, a check that
misreads a text would overrule the vote. Across answers only wrong arithmetic counts, as a smaller
vote, and only as far as the data show that it goes with answers that others do not state
(`vote_of_wrong`). `agreement` is treated alike: without a gold answer it is shifted so that every
answer has the same mean. (Measured on labelled data without gold answers, against the plain vote:
checks that cut across answers lost up to .09 of AUC, an agreement that does up to .08.)

With a gold answer, a rationale of which no answer could be read has q_k = `UNREAD`; 0 if others
state answers and none of them is right, for then the question is one that teachers fail at.

Where the arithmetic of every rationale with the likeliest answer is wrong (`DOUBT`), the problem is
not to be learned from: each v is multiplied by 1e-6, which keeps their order and is below `LEAST`.
(Of right answers of mrben_math and processbench_gsm8k that rest on such texts only, 10 of 11 have a
step that is labelled wrong.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from compact.validity.agreement import agreement, document_frequencies
from compact.validity.cases import Case, own_votes, shares
from compact.validity.checks import CHECKS, Outcomes, arithmetic, check, evidence, rates_by_kind
from compact.validity.votes import (
    answer_probabilities,
    learn_weights,
    lowered,
    vote_of_wrong,
    votes_for,
)

LEAST = 1e-3
"""A problem whose validities sum to less is left out: all its rationales are known to be wrong."""
DOUBT = math.log(2.0)
"""Arithmetic is wrong if the evidence against it is more than this, in nats: such a text would have
so many failures by chance less often than not."""
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
        agreement: C_k, how far it agrees with the others that count; 0..1 with a gold answer.
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
    return Judge(cases).judged


class Judge:
    """Judges problems one by one, with what it has learned from some of them.

    Attributes:
        judged: the judgements of the problems that it learned from, per rationale of each.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        """Learns what teachers, checks and words are worth.

        Args:
            cases: the problems to learn from: all of the data, or a sample.
        """
        own = [own_votes(case) for case in cases]
        wrong = [_miscounts(case) for case in cases]
        self._of_wrong = vote_of_wrong(cases, own, wrong)
        votes = [lowered(s, w, self._of_wrong) for s, w in zip(own, wrong, strict=True)]
        self._weight = learn_weights(cases, votes)
        read = [self._read(case, v) for case, v in zip(cases, votes, strict=True)]
        self._rates = rates_by_kind(
            [
                (case.kind, *pair)
                for case, r in zip(cases, read, strict=True)
                for pair in zip(r.outcomes, r.witnesses, strict=True)
            ]
        )
        self._frequencies = document_frequencies(cases)
        self.judged = [self._judge(case, r) for case, r in zip(cases, read, strict=True)]

    def __call__(self, case: Case) -> tuple[Judgement, ...]:
        """Returns one judgement per rationale of a problem."""
        votes = lowered(own_votes(case), _miscounts(case), self._of_wrong)
        return self._judge(case, self._read(case, votes))

    def _read(self, case: Case, votes: list[float]) -> _Read:
        own = shares(case)
        likely = answer_probabilities(case, votes, self._weight)
        witnesses = [q * s for q, s in zip(likely, own, strict=True)] if any(likely) else own
        return _Read(likely, witnesses, check(case, witnesses))

    def _judge(self, case: Case, read: _Read) -> tuple[Judgement, ...]:
        agreed = agreement(case, read.witnesses, self._frequencies)
        return _judgements(case, read.likely, read.outcomes, self._rates[case.kind], agreed)


class _Read(NamedTuple):
    """What is read of a problem: [K] how likely each answer is, how much it counts, its checks."""

    likely: list[float]
    witnesses: list[float]
    outcomes: list[Outcomes]


def _miscounts(case: Case) -> list[bool]:
    """Returns [K] whether the arithmetic of each rationale is wrong."""
    return [bool(outcome.failures) for outcome in arithmetic(case)]


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
        unread = UNREAD if any(likely) or not stated else 0.0
        likely = [unread if a is None else q for q, a in zip(likely, answers, strict=True)]
    # A tie has no likeliest answer: nobody is told to differ from it.
    top = max(likely)
    leaders = {a for a, q in zip(answers, likely, strict=True) if q == top}
    leading = leaders.pop() if basis == "vote" and len(leaders) == 1 else None
    groups = _groups(case)
    if case.gold is None:
        agreed = _level(agreed, groups)
    evidences = [evidence(of_rationale, rates) for of_rationale in outcomes]
    doubted = [e["arithmetic"] > DOUBT for e, q in zip(evidences, likely, strict=True) if q == top]
    scale = 1e-3 * LEAST if all(doubted) else 1.0
    kept = [math.exp(-sum(against.values())) for against in evidences]
    best = [0.0] * len(kept)
    for group in groups:
        most = max(kept[k] for k in group)
        for k in group:
            best[k] = most
    levels = sorted(set(likely))
    below = dict(zip(levels, [0.0, *levels], strict=False))
    judgements = []
    for k, (share, against) in enumerate(zip(shares(case), evidences, strict=True)):
        lower = below[likely[k]]
        findings = _about_the_answer(answers[k], likely[k], case.gold, leading)
        findings += [
            Finding(name, step, text)
            for name in CHECKS
            if against[name] > 0
            for step, text in outcomes[k][name].failures
        ]
        if share < 1.0:
            findings.append(Finding("copy", None, f"{round(1 / share)} rationales have this text"))
        # kept / best is 1 for the best one: ties between answers stay exact.
        validity = scale * share * (lower + (likely[k] - lower) * (kept[k] / best[k]))
        judgements.append(Judgement(validity, agreed[k], basis, tuple(findings)))
    return tuple(judgements)


def _groups(case: Case) -> list[list[int]]:
    """Returns the rationales of each answer; one that states none is alone."""
    found: dict[str | int, list[int]] = {}
    for k, rationale in enumerate(case.rationales):
        found.setdefault(votes_for(rationale, k), []).append(k)
    return list(found.values())


def _level(values: Sequence[float], groups: Sequence[Sequence[int]]) -> list[float]:
    """Returns the values, shifted so that those of every group have the mean of all."""
    middle = fmean(values)
    levelled = list(values)
    for group in groups:
        mean = fmean(values[k] for k in group)
        for k in group:
            levelled[k] = values[k] - mean + middle
    return levelled


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
