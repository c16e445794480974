"""Checks of steps that a person can repeat: arithmetic, and numbers from nowhere.

- `arithmetic`: an equation of the text does not hold ("4 + 14 = 20").
- `numbers`: a number comes from nowhere. It is not in the question, is not the result of an
  equation that holds and has known operands, is none of these rewritten (`_sources_of`), and no
  other text that counts has it. A text counts if it weighs at least `LEAST_SUPPORT` of the one that
  weighs most.

A check has n opportunities in a rationale (its equations; its new numbers) and fires u times. Its
evidence against the rationale is how unlikely that is by chance: -log P(X >= u), X a Poisson
variable of mean n times the base rate, the share of opportunities at which the check fires over the
data. So a check that fires everywhere, because the texts are misread or very long, says nothing,
and a rare one says much. Each kind of problem (`Case.kind`) has base rates of its own, which start
from those of all: years are common in answers of yes or no, and rare in calculations. The base rate
of `arithmetic` counts up to `MISREAD` only: where more equations fail, it is the teachers and not
the reader. The evidence of a check is at most `MOST` nats.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from compact.text.equations import Equation, equations, equations_of_steps, numbers
from compact.text.numbers import format_number, fractions_of, numbers_in_words, parse_number
from compact.validity.cases import Case

MOST = 3.0
"""Most evidence of one check, in nats: it leaves a rationale 1/20 of its weight."""
MISREAD = 0.1
"""Largest share of equations that the reader may have misread. In right rationales .004 of those of
asdiv fail, .012 of math_l5, .14 of mmlu_pro; most of the latter are errors, read by eye."""
_START = {"arithmetic": 0.01, "numbers": 0.05}
"""Base rates to start from."""
_PRIOR = 20.0
"""How many opportunities they count as."""
CHECKS = tuple(_START)
_KNOWN = frozenset(("0", "1", "2", "100"))
"""Numbers that need no source: halves, doubles, percentages."""
_FACTORS = frozenset(("7", "12", "24", "52", "60", "365", "3600"))
"""Numbers that need none as factors: days of a week, seconds of an hour. Where they needed none
anywhere, AUC on svamp12 with planted errors fell by .005."""
LEAST_SUPPORT = 0.5
"""Share of the largest weight that a text must have to be a source of numbers. One other such text
is enough, however many there are. On asdiv with planted errors, AUC falls by .003 without gold
answers if every text above weight 0 is a source, and by .004 with them if all texts are."""


class Outcome(NamedTuple):
    """The result of one check on one rationale.

    Attributes:
        chances: n, how often the check could have fired.
        failures: (index of the step, what failed, in words) of each failure.
    """

    chances: int
    failures: tuple[tuple[int, str], ...]


Outcomes = Mapping[str, Outcome]


def check(case: Case, weights: Sequence[float]) -> list[Outcomes]:
    """Returns the outcome of every check on every rationale.

    Args:
        case: the problem.
        weights: [K] how much each rationale counts as a source of numbers.
    """
    question = frozenset(
        (
            *numbers(case.prompt),
            *numbers_in_words(case.prompt),
            *(number for given in fractions_of(case.prompt) for number in _forms_of(given)),
            *numbers(case.gold or ""),
        )
    )
    # Texts count, not rationales, because a copy says nothing new.
    found = {r.text: _found_numbers(r.step_texts) for r in case.rationales}
    weight = dict.fromkeys(found, 0.0)
    for rationale, of_rationale in zip(case.rationales, weights, strict=True):
        weight[rationale.text] += of_rationale
    least = LEAST_SUPPORT * max(weight.values())
    counted = {text for text in found if weight[text] >= least > 0}
    having = Counter(number for text in counted for number in found[text])
    outcomes: list[Outcomes] = []
    for rationale, of_equations in zip(case.rationales, arithmetic(case), strict=True):
        own = rationale.text in counted
        of_numbers = Outcome(0, ())
        if len(counted) > own:
            others = {number for number in found[rationale.text] if having[number] > own}
            of_numbers = _sources(rationale.step_texts, question, others)
        outcomes.append({"arithmetic": of_equations, "numbers": of_numbers})
    return outcomes


def _forms_of(fraction: Fraction) -> tuple[str, ...]:
    """Returns the forms of a given fraction and of its rest: 3/4, 3, 4, 75, 1/4, 1, 25."""
    both = (fraction, abs(1 - fraction))
    found = (form for f in both for form in (f, 100 * f, f.numerator, f.denominator))
    return tuple(format_number(Fraction(form)) for form in found)


def arithmetic(case: Case) -> list[Outcome]:
    """Returns the outcome of the check `arithmetic` on every rationale."""
    return [_arithmetic(rationale.step_texts) for rationale in case.rationales]


def base_rates(
    outcomes: Iterable[tuple[Outcomes, float]], start: Mapping[str, float] = _START
) -> dict[str, float]:
    """Returns the base rate of each check over rationales with weights.

    Args:
        outcomes: the outcomes and the weight of each rationale.
        start: the rates to start from, as if `_PRIOR` opportunities had been seen.
    """
    fired = {name: rate * _PRIOR for name, rate in start.items()}
    total = dict.fromkeys(start, _PRIOR)
    for of_rationale, weight in outcomes:
        for name, outcome in of_rationale.items():
            fired[name] += weight * len(outcome.failures)
            total[name] += weight * outcome.chances
    return {name: fired[name] / total[name] for name in start}


def rates_by_kind(
    outcomes: Sequence[tuple[str, Outcomes, float]],
) -> Mapping[str, Mapping[str, float]]:
    """Returns the base rates of each kind of problem; of a kind not seen, those of all.

    Args:
        outcomes: the kind of its problem, the outcomes and the weight of each rationale.
    """
    of_all = base_rates((found, weight) for _, found, weight in outcomes)
    rates: defaultdict[str, Mapping[str, float]] = defaultdict(lambda: of_all)
    for kind in {kind for kind, _, _ in outcomes}:
        own = ((found, weight) for of, found, weight in outcomes if of == kind)
        rates[kind] = base_rates(own, of_all)
    return rates


def evidence(outcomes: Outcomes, rates: Mapping[str, float]) -> dict[str, float]:
    """Returns the evidence of each check against a rationale, in nats, 0 to `MOST`."""
    rates = {**rates, "arithmetic": min(rates["arithmetic"], MISREAD)}
    return {
        name: min(_surprise(len(o.failures), o.chances * rates[name]), MOST)
        for name, o in outcomes.items()
    }


def _surprise(count: int, mean: float) -> float:
    """Returns -log P(X >= count) of a Poisson variable X."""
    if count == 0:
        return 0.0
    # Sum the tail on the side away from the mean: its terms get smaller, until one is 0.
    above = count > mean
    i = count if above else count - 1
    term = math.exp(i * math.log(max(mean, 1e-300)) - mean - math.lgamma(i + 1))
    total = 0.0
    while term > 1e-17 * total:
        total += term
        term *= mean / (i + 1) if above else i / mean
        i += 1 if above else -1
    tail = total if above else 1.0 - total
    return -math.log(min(max(tail, 1e-300), 1.0))


def _found_numbers(steps: Sequence[str]) -> frozenset[str]:
    return frozenset(number for step in steps for number in numbers(step))


def _arithmetic(steps: Sequence[str]) -> Outcome:
    count, failures = 0, []
    for i, of_step in enumerate(equations_of_steps(steps)):
        for equation in of_step:
            count += 1
            if not equation.holds:
                failures.append((i, f"{_shown(equation)} does not hold"))
    return Outcome(count, tuple(failures))


def _shown(equation: Equation) -> str:
    """Returns the equation with the operands in the order of the text: "4 + 14 = 20"."""
    left, _, right = equation.key.partition("=")
    signs = set(left) & set("+-*/^()")
    if len(signs) == 1 and signs <= {"+", "*"}:  # the normal form sorts these
        left = signs.pop().join(equation.operands)
    return re.sub(r"(?<=[\w)])([-+*/])", r" \1 ", left) + f" = {right}"


def _sources(steps: Sequence[str], question: frozenset[str], others: Set[str]) -> Outcome:
    """Returns the outcome of `numbers` on a rationale.

    Args:
        steps: the steps of the rationale.
        question: the numbers of the question.
        others: the numbers that other texts have.
    """
    known = set(question)
    new: set[str] = set()
    failures = []
    for i, step in enumerate(steps):
        for equation in equations(step):
            if equation.holds and ("*" in equation.key or "/" in equation.key):
                known.update(_FACTORS.intersection(equation.operands))
            if equation.holds and all(_has_source(n, known) for n in equation.operands):
                new.update(number for number in equation.right if not _has_source(number, known))
                known.update(equation.right)
        for number in numbers(step):
            if _has_source(number, known):
                continue
            known.add(number)
            new.add(number)
            if number not in others:
                what = f"{number} is neither given nor computed, and no other rationale that counts"
                failures.append((i, f"{what} has it"))
    return Outcome(len(new), tuple(failures))


def _has_source(number: str, known: Set[str]) -> bool:
    return number in _KNOWN or number in known or not known.isdisjoint(_sources_of(number))


@lru_cache(maxsize=65536)
def _sources_of(number: str) -> tuple[str, ...]:
    """Returns the numbers that are often rewritten as `number` without an equation.

    20% is 0.2, leaves 80% or 0.8, and raises to 120% or 1.2; 3 thousand is 3000, and 3 km 3000 m.
    """
    n = parse_number(number)
    if n is None:
        return ()
    powers = [10**i for i in (2, 3, 6, 9)]
    shares = [100 - n, n - 100, 100 * (1 - n), 100 * (n - 1)]
    found = [*(n * p for p in powers), *(n / p for p in powers), *(x for x in shares if x > 0)]
    return tuple(format_number(x) for x in found)
