"""Plants one error in a real rationale, so that right and wrong can be told apart with certainty.

`hidden`: a number before the answer is changed wherever it stands, the right final answer is kept.
`carried`: a number before the answer is changed and carried on: what follows from it by the text's
own equations is computed anew, and so is the final answer.
`operation`: it adds where it should subtract and subtracts where it should add, and carries that
on. The other errors differ from problem to problem; this one is a habit, and a student learns it.

`compact planted DATA --teachers NAME ... --out FILE` makes teachers of a file mislead.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

from compact.answers import normalise_answer
from compact.data import Problem
from compact.text.numbers import parse_number
from compact.text.steps import find_marker

_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w%])(?!\.\d)")
_SIGN = re.compile(r"[-+*/×÷−]|(?<=\s)x(?=\s)")
_UNIT = re.compile(r"^[\s$]*(?:[A-Za-z]+[\s$]*){0,3}$")
_SWAPPED = {"+": "-", "-": "+", "−": "+"}
_TRIES = 40


def hidden(completion: str, gold: str, rng: random.Random) -> str | None:
    """Changes a number before the answer marker wherever it stands there; the answer is kept.

    Returns:
        The corrupted completion, or None where nothing before the marker can be changed.
    """
    body, answer = _split(completion)
    values = _values(body)
    if not values:
        return None
    old = rng.choice(values)
    new = _other(old, values, rng)
    return _replaced(body, {old: new}) + answer


def carried(completion: str, gold: str, rng: random.Random) -> str | None:
    """Changes a number before the answer marker and carries it on to a wrong final answer.

    Returns:
        The corrupted completion, or None where no number leads to the answer by whole steps.
    """
    body, answer = _split(completion)
    values, target = _values(body), parse_number(normalise_answer(gold))
    chain = _equations(body)
    if not values or target is None:
        return None
    for _ in range(_TRIES):
        old = rng.choice(values)
        changed = {old: _other(old, values, rng)}
        for operands, signs, _, result in chain:
            if result == old or not any(operand in changed for operand in operands):
                continue
            new = _evaluate([changed.get(operand, operand) for operand in operands], signs)
            if new is None or new < 0 or new.denominator != 1:
                break
            changed[result] = new
        else:
            if changed.get(target, target) != target:
                return _replaced(body, changed) + _replaced(answer, {target: changed[target]})
    return None


def operation(completion: str, gold: str, rng: random.Random) -> str | None:
    """Swaps addition and subtraction in every equation and carries on to a wrong final answer.

    Returns:
        The corrupted completion, or None where no sum leads to the answer, by whole steps and with
        results that can be told from what they are made of.
    """
    body, answer = _split(completion)
    target = parse_number(normalise_answer(gold))
    swapped = list(body)
    changed: dict[Fraction, Fraction] = {}
    seen: set[Fraction] = set()
    for operands, signs, places, result in _equations(body):
        seen.update(operands)
        signs = [_SWAPPED.get(sign, sign) for sign in signs]
        new = _evaluate([changed.get(operand, operand) for operand in operands], signs)
        if new is None or new < 0 or new.denominator != 1 or result in seen - changed.keys():
            return None
        for place, sign in zip(places, signs, strict=True):
            swapped[place] = sign
        changed[result] = new
    if target is None or changed.get(target, target) == target:
        return None
    return _replaced("".join(swapped), changed) + _replaced(answer, {target: changed[target]})


PLANTS: dict[str, Callable[[str, str, random.Random], str | None]] = {
    "carried": carried,
    "hidden": hidden,
    "operation": operation,
}
"""The kinds of error: function of completion, gold answer and randomness."""


def _split(completion: str) -> tuple[str, str]:
    marker = find_marker(completion)
    return completion[:marker], completion[marker:]


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _values(body: str) -> list[Fraction]:
    """The distinct numbers of a text, in order of appearance."""
    return list(dict.fromkeys(_value(number) for number in _NUMBER.findall(body)))


def _other(old: Fraction, values: list[Fraction], rng: random.Random) -> Fraction:
    """A number near `old`, of the same kind, that the text does not hold."""
    errors = [e for e in (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10) if old + e > 0]
    return rng.choice([old + e for e in errors if old + e not in values] or [old + 17])


def _replaced(text: str, changed: dict[Fraction, Fraction]) -> str:
    """Writes the changed numbers as the old ones were written, with as many decimals."""

    def new(match: re.Match[str]) -> str:
        value = _value(match.group())
        if value not in changed:
            return match.group()
        decimals = len(match.group().partition(".")[2])
        return f"{float(changed[value]):.{decimals}f}"

    return _NUMBER.sub(new, text)


def _equations(body: str) -> list[tuple[list[Fraction], list[str], list[int], Fraction]]:
    """Operands, signs, where these stand, and result of each equation that holds.

    Units are allowed between operands.

    Where a text leaves the result open ("290 ÷ 2 = ?") it is computed.
    """
    found = []
    for match in re.finditer("=", body):
        before = re.split(r"[=\n;:?!]|\.\s|,\s", body[: match.start()])[-1]
        start = match.start() - len(before)
        numbers = list(_NUMBER.finditer(before))
        operands: list[Fraction] = []
        signs: list[str] = []
        places: list[int] = []
        for i, number in enumerate(numbers):
            left = numbers[i - 1].end() if i else 0
            gap = before[left : number.start()]
            sign = list(_SIGN.finditer(gap))
            if i and len(sign) == 1 and _UNIT.match(_SIGN.sub(" ", gap)):
                signs.append(sign[0].group())
                places.append(start + left + sign[0].start())
            else:
                operands, signs, places = [], [], []
            operands.append(_value(number.group()))
        value = _evaluate(operands, signs) if len(operands) > 1 else None
        after = re.match(r"[\s$]*(?:(\?)|(" + _NUMBER.pattern + "))", body[match.end() :])
        if value is None or after is None:
            continue
        if after.group(1) or abs(_value(after.group(2)) - value) <= Fraction(1, 100):
            found.append((operands, signs, places, value))
    return found


def _evaluate(operands: list[Fraction], signs: list[str]) -> Fraction | None:
    """Products before sums; None for a division by 0."""
    terms = [operands[0]]
    for sign, operand in zip(signs, operands[1:], strict=True):
        if sign in "*×x":
            terms[-1] *= operand
        elif sign in "/÷":
            if operand == 0:
                return None
            terms[-1] /= operand
        else:
            terms.append(operand if sign == "+" else -operand)
    return sum(terms, Fraction(0))


def mislead(
    problems: Sequence[Problem], teachers: Collection[str], kind: str, seed: int
) -> tuple[list[dict[str, Any]], int, int]:
    """Writes rationales anew with an error in each of some teachers' rationales.

    Args:
        problems: with text completions.
        teachers: whose rationales get an error.
        kind: a key of `PLANTS`.
        seed: which errors.

    Returns:
        Rows in the data format, how many rationales got an error, and how many the teachers have.

    Raises:
        ValueError: a teacher without rationales, or a completion of chat messages.
    """
    known = {r.teacher for p in problems for r in p.rationales}
    for name in teachers:
        if name not in known:
            raise ValueError(f"teachers must be of {', '.join(sorted(known))}, got {name!r}")
    rng = random.Random(seed)
    rows, planted, theirs = [], 0, 0
    for problem in problems:
        for rationale in problem.rationales:
            completion = rationale.completion
            if rationale.teacher in teachers:
                if not isinstance(completion, str):
                    raise ValueError(
                        f"{problem.question_id}: completion must be text, got messages"
                    )
                spoilt = PLANTS[kind](completion, problem.answer, rng)
                theirs += 1
                planted += spoilt is not None
                completion = spoilt or completion
            rows.append(
                {
                    "question_id": problem.question_id,
                    "prompt": problem.prompt,
                    "teacher": rationale.teacher,
                    "completion": completion,
                    "answer": problem.answer,
                }
            )
    return rows, planted, theirs
