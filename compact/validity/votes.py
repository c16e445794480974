"""How likely each stated answer is: the gold answer, or a vote that trusts good teachers more.

With a gold answer a statement is right or wrong. Without one, the rationales vote:
q(a) ~ exp(sum of b_k w_t over the rationales k, of teachers t, that state a), with one more term 1
for "none of these". b_k is how much of a vote a rationale has: copies of a text share one
(`cases.own_votes`), and wrong arithmetic costs (`judge`).
w_t = log(c_t (n - 1) / (1 - c_t)) is the weight of a teacher that is right with probability c_t, if
wrong answers spread over n - 1 others (Dawid and Skene, 1979); n is the mean number of different
answers to a question, plus one.

c_t is learned from all problems: how likely t's answers are by the gold answer or by the votes of
the other teachers, repeated until it settles. Differences between teachers count only as far as
they exceed chance: c_t is shrunk to the mean by tau^2 / (tau^2 + s_t^2), s_t its standard error and
tau^2 the variance between teachers beyond it (DerSimonian and Laird, 1986). Teachers that cannot be
told apart have equal votes, and the result is the plain vote.

The standard error is taken as twice its formula, because questions on which teachers fail are not
independent: families of models share errors. With the plain formula, noise was taken for skill on
reasoning_gym and labelled/choices (-.03 and -.02 against the plain vote; 0 with the doubled one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compact.validity.cases import Case, Solution

_ROUNDS = 10
_PRIOR = 10.0
_MOST = 0.95
"""Largest c_t: no teacher is beyond doubt."""
_DOUBT = 2.0
"""Factor of the standard errors."""
_TINY = 1e-12
_LEAST = 0.05
"""Smallest w_t. A teacher that is mostly wrong does not vote for the other answers."""


def answer_probabilities(
    case: Case, votes: Sequence[float], weight: Mapping[str, float]
) -> list[float]:
    """Returns [K] how likely the answer of each rationale is the right one.

    A rationale without an answer agrees with nobody; it is never right by a gold answer.

    Args:
        case: the problem.
        votes: [K] how much of a vote each rationale has, 0..1.
        weight: w_t of the teachers; 1 for a teacher that is missing.
    """
    if case.gold is not None:
        return [float(r.answer == case.gold) for r in case.rationales]
    total = _totals(case, votes, weight)
    most, whole = _sum_of_exp(total)
    chance = {answer: math.exp(value - most) / whole for answer, value in total.items()}
    return [chance[votes_for(r, k)] for k, r in enumerate(case.rationales)]


def vote_of_wrong(
    cases: Sequence[Case], votes: Sequence[Sequence[float]], wrong: Sequence[Sequence[bool]]
) -> float:
    """Returns the factor of the votes of rationales in which something is wrong.

    It is how likely their answers are, by the gold answer or by the votes of others, over how
    likely those of all other rationales are; at most 1. It starts from 1, as if `_PRIOR` such
    rationales had been seen.

    Args:
        cases: the problems.
        votes: how much of a vote each of their rationales has.
        wrong: whether something is wrong in it.
    """
    total = {True: 0.0, False: 0.0}
    count = {True: 0, False: 0}
    for case, mine, is_wrong in zip(cases, votes, wrong, strict=True):
        for likely, which in zip(_by_others(case, mine, {}), is_wrong, strict=True):
            if likely is not None:
                total[which] += likely
                count[which] += 1
    sound = total[False] / count[False] if count[False] else 0.0
    factor = 1.0
    if sound > 0:
        factor = (total[True] + _PRIOR * sound) / ((count[True] + _PRIOR) * sound)
    return min(factor, 1.0)


def lowered(votes: Sequence[float], wrong: Sequence[bool], factor: float) -> list[float]:
    """Returns the votes of a problem, times `factor` where something is wrong."""
    return [v * factor if which else v for v, which in zip(votes, wrong, strict=True)]


def learn_weights(cases: Sequence[Case], votes: Sequence[Sequence[float]]) -> dict[str, float]:
    """Returns the weight w_t of every teacher.

    Args:
        cases: the problems.
        votes: how much of a vote each of their rationales has, 0..1.
    """
    teachers = sorted({r.teacher for case in cases for r in case.rationales})
    counts = [len({r.answer for r in c.rationales if r.answer is not None}) for c in cases]
    others = max(float(np.mean(counts)), 1.0) if counts else 1.0
    weight = dict.fromkeys(teachers, 1.0)
    for _ in range(_ROUNDS):
        seen: dict[str, list[float]] = {teacher: [] for teacher in teachers}
        for case, mine in zip(cases, votes, strict=True):
            by_others = _by_others(case, mine, weight)
            for rationale, likely in zip(case.rationales, by_others, strict=True):
                if likely is not None:
                    seen[rationale.teacher].append(likely)
        chance = [
            p
            for case, mine in zip(cases, votes, strict=True)
            for p in answer_probabilities(case, mine, weight)
        ]
        right = _shrunk(seen, float(np.mean(chance)) if chance else 0.5)
        new = {t: max(math.log(c * others / (1.0 - c)), _LEAST) for t, c in right.items()}
        settled = all(abs(new[t] - weight[t]) < 1e-6 for t in teachers)
        weight = new
        if settled:
            break
    return weight


def _by_others(
    case: Case, votes: Sequence[float], weight: Mapping[str, float]
) -> list[float | None]:
    """Returns [K] how likely each answer is by the other rationales; None if there are none."""
    if case.gold is not None:
        return list(answer_probabilities(case, votes, weight))
    voters = sum(r.answer is not None for r in case.rationales)
    if len(case.rationales) < 2 or voters < 2:
        return [None] * len(case.rationales)
    total = _totals(case, votes, weight)
    most, whole = _sum_of_exp(total)
    likely: list[float | None] = []
    for rationale, vote in zip(case.rationales, votes, strict=True):
        if rationale.answer is None:
            likely.append(0.0)
            continue
        with_own = total[rationale.answer] - most
        left = math.exp(with_own - vote * weight.get(rationale.teacher, 1.0))
        likely.append(left / (whole - math.exp(with_own) + left))
    return likely


def _totals(
    case: Case, votes: Sequence[float], weight: Mapping[str, float]
) -> dict[str | int, float]:
    """Returns the sum of the votes for each stated answer."""
    total: dict[str | int, float] = {}
    for k, (rationale, vote) in enumerate(zip(case.rationales, votes, strict=True)):
        answer = votes_for(rationale, k)
        total[answer] = total.get(answer, 0.0) + vote * weight.get(rationale.teacher, 1.0)
    return total


def votes_for(rationale: Solution, k: int) -> str | int:
    """Returns what a rationale votes for: its answer, or an answer of its own if none was read."""
    return k if rationale.answer is None else rationale.answer


def _sum_of_exp(total: Mapping[str | int, float]) -> tuple[float, float]:
    """Returns m, the largest total, and the sum of exp(total - m), with 0 for "none of these"."""
    every = [0.0, *total.values()]
    most = max(every)
    return most, sum(math.exp(value - most) for value in every)


def _shrunk(seen: Mapping[str, Sequence[float]], mean: float) -> dict[str, float]:
    """Returns c_t of every teacher: `mean`, plus as much of its own difference as is certain."""
    known = {t: np.asarray(values) for t, values in seen.items() if values}
    if not known:
        return dict.fromkeys(seen, min(max(mean, 1.0 - _MOST), _MOST))
    # The variance within a teacher starts from that of answers, right or not, of which nobody is
    # better, as if `_PRIOR` of them had been seen.
    each = np.concatenate(list(known.values()))
    within = sum(float(np.square(v - v.mean()).sum()) for v in known.values())
    even = float(each.mean() * (1.0 - each.mean()))
    spread = max((within + _PRIOR * even) / (len(each) + _PRIOR), _TINY)
    own = np.array([v.mean() for v in known.values()])
    error = _DOUBT**2 * spread / np.array([len(v) for v in known.values()])
    precision = 1.0 / error
    centre = (precision * own).sum() / precision.sum()
    excess = (precision * (own - centre) ** 2).sum() - (len(own) - 1)
    scale = precision.sum() - (precision**2).sum() / precision.sum()
    between = max(excess / scale, 0.0) if scale > 0 else 0.0
    difference = (own - centre) * between / (between + error)
    found = dict(zip(known, mean + difference, strict=True))
    return {t: min(max(float(found.get(t, mean)), 1.0 - _MOST), _MOST) for t in seen}
