"""Plants an error in a real rationale, so that it is certain which rationales are wrong.

- `hidden`: one number before the answer is replaced everywhere; the right final answer is kept.
  The numbers of steps ("1.", "Step 2:") stay, and so do times and other digits that
  `compact.text.equations.numbers` does not read: another list number would be no error.
- `carried`: one number before the answer is replaced everywhere. The results of the text's own
  equations are computed again from it, and so is the final answer.
- `operation`: every addition becomes a subtraction and every subtraction an addition. The results
  and the final answer are computed again. The errors of the other kinds differ from problem to
  problem; this one is the same in all problems, so that a student can learn it.
- `sign`: the same swap, but the results and the final answer stay. The equations are then false,
  and the answer does not show it.

`compact planted DATA --teachers NAME ... --out FILE` plants errors in the rationales of teachers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

from compact.answers import normalise_answer
from compact.data import Problem, Text, text_of
from compact.text.equations import list_number, numbers
from compact.text.numbers import format_number, parse_number
from compact.text.steps import find_marker, split_steps

_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w%])(?!\.\d)")
_SIGN = re.compile(r"[-+*/×÷−]|(?<=\s)x(?=\s)")
_UNIT = re.compile(r"^[\s$]*(?:[A-Za-z]+[\s$]*){0,3}$")
_SWAPPED = {"+": "-", "-": "+", "−": "+"}
_TRIES = 40


def hidden(completion: str, gold: str, rng: random.Random) -> str | None:
    """Replaces one number everywhere before the answer marker; keeps the answer.

    Returns:
        The corrupted completion, or None if there is no number before the marker.
    """
    body, answer = _split(completion)
    values = _values(body)
    read = _read(body, values)
    if not read:
        return None
    old = rng.choice(read)
    new = _other(old, values, rng)
    return _replaced(body, {old: new}) + answer


def carried(completion: str, gold: str, rng: random.Random) -> str | None:
    """Replaces one number and recomputes the results that depend on it, up to a wrong final answer.

    Returns:
        The corrupted completion, or None if no number was found that changes the answer and leaves
        all results whole and not negative.
    """
    body, answer = _split(completion)
    values, target = _values(body), parse_number(normalise_answer(gold))
    read, chain = _read(body, values), _equations(body)
    if not read or target is None:
        return None
    for _ in range(_TRIES):
        old = rng.choice(read)
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
    """Swaps + and - in every equation and recomputes the results, up to a wrong final answer.

    Returns:
        The corrupted completion, or None if the answer stays the same, if a result is negative or
        not whole, or if a result equals an operand that came before it, so that it is unclear
        which of the two a later number refers to.
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


def sign(completion: str, gold: str, rng: random.Random) -> str | None:
    """Swaps + and - in every equation and keeps the results, so that the answer stays right.

    Returns:
        The corrupted completion, or None if no equation has a + or - whose swap makes it false.
    """
    body, answer = _split(completion)
    swapped, false = list(body), False
    for operands, signs, places, result in _equations(body):
        signs = [_SWAPPED.get(sign, sign) for sign in signs]
        false |= _evaluate(operands, signs) != result
        for place, sign in zip(places, signs, strict=True):
            swapped[place] = sign
    return "".join(swapped) + answer if false else None


PLANTS: dict[str, Callable[[str, str, random.Random], str | None]] = {
    "carried": carried,
    "hidden": hidden,
    "operation": operation,
    "sign": sign,
}
"""The kinds of error: functions of completion, gold answer and random generator."""


def _split(completion: str) -> tuple[str, str]:
    marker = find_marker(completion)
    return completion[:marker], completion[marker:]


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def _values(body: str) -> list[Fraction]:
    """Returns the distinct numbers of a text, in order of appearance."""
    return list(dict.fromkeys(_value(number) for number in _NUMBER.findall(body)))


def _read(body: str, values: Sequence[Fraction]) -> list[Fraction]:
    """Returns those of the values that are read as numbers of a step, not as list numbers."""
    if not values:
        return []
    steps = split_steps(body)
    texts = [*(step.text for step in steps), body[steps[-1].end :]]  # after "Final answer:"
    known = {number for text in texts for number in numbers(text)}
    return [value for value in values if format_number(value) in known]


def _other(old: Fraction, values: list[Fraction], rng: random.Random) -> Fraction:
    """Returns a positive number near `old` that is not among `values`."""
    errors = [e for e in (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10) if old + e > 0]
    return rng.choice([old + e for e in errors if old + e not in values] or [old + 17])


def _replaced(text: str, changed: dict[Fraction, Fraction]) -> str:
    """Replaces the numbers of a text, but for list numbers.

    Each keeps its number of decimals and its commas.
    """
    steps = split_steps(text) if text.strip() else []
    listed = {
        place
        for step in steps
        for place in range(step.start, step.start + len(list_number(step.text)))
    }

    def new(match: re.Match[str]) -> str:
        value = _value(match.group())
        if value not in changed or match.start() in listed:
            return match.group()
        decimals = len(match.group().partition(".")[2])
        comma = "," if "," in match.group() else ""
        return f"{float(changed[value]):{comma}.{decimals}f}"

    return _NUMBER.sub(new, text)


def _equations(body: str) -> list[tuple[list[Fraction], list[str], list[int], Fraction]]:
    """Returns (operands, signs, positions of the signs, result) of each equation that holds.

    Units are allowed between operands. If the text leaves the result open ("290 ÷ 2 = ?"), it is
    computed. Unlike `compact.text.equations`, this keeps positions in the text as it was written.
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
    """Returns the value of an expression, products before sums; None for a division by 0."""
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
    """Returns all rationales as rows, with an error in the rationales of some teachers.

    Args:
        problems: problems with text completions.
        teachers: the teachers whose rationales get an error.
        kind: a key of `PLANTS`.
        seed: seed of the random choices.

    Returns:
        Rows in the data format, with `right`: whether a rationale states the gold answer and got no
        error (missing without a gold answer); the number of rationales that got an error, and the
        number of rationales that these teachers have.

    Raises:
        ValueError: a teacher has no rationale, or one of its rationales is chat messages or has
            no gold answer.
    """
    _check_teachers(problems, teachers)
    rng = random.Random(seed)
    rows, planted, theirs = [], 0, 0
    for problem in problems:
        for rationale in problem.rationales:
            completion = rationale.completion
            spoilt = None
            if rationale.teacher in teachers:
                spoilt = _spoilt(problem, completion, kind, rng)
                theirs += 1
                planted += spoilt is not None
                completion = spoilt or completion
            row: dict[str, Any] = {
                "question_id": problem.question_id,
                "prompt": problem.prompt,
                "teacher": rationale.teacher,
                "completion": completion,
            }
            if problem.answer is not None:
                row["answer"] = problem.answer
                row["right"] = spoilt is None and _states_gold(problem, completion)
            if problem.answer_type is not None:
                row["answer_type"] = problem.answer_type
            rows.append(row)
    return rows, planted, theirs


def pairs(
    problems: Sequence[Problem], teachers: Collection[str], kind: str, seed: int
) -> list[dict[str, Any]]:
    """Returns preference pairs: a right rationale is chosen, its copy with an error is rejected.

    The two completions of a pair are by the same teacher and differ in the error only, so neither
    style nor length (but for the digits of the numbers) tells them apart.

    Args:
        problems: problems with text completions.
        teachers: the teachers whose rationales are used.
        kind: a key of `PLANTS`.
        seed: seed of the random choices.

    Returns:
        At most one row a problem, of a teacher that is drawn: question_id, prompt, chosen, rejected
        and teacher. No row where no rationale states the gold answer and can get an error.

    Raises:
        ValueError: as in `mislead`, or there is no row at all.
    """
    _check_teachers(problems, teachers)
    rng = random.Random(seed)
    rows = []
    for problem in problems:
        theirs = [r for r in problem.rationales if r.teacher in teachers]
        for rationale in rng.sample(theirs, len(theirs)):
            spoilt = _spoilt(problem, rationale.completion, kind, rng)
            if spoilt is not None and _states_gold(problem, rationale.completion):
                rows.append(
                    {
                        "question_id": problem.question_id,
                        "prompt": problem.prompt,
                        "chosen": rationale.completion,
                        "rejected": spoilt,
                        "teacher": rationale.teacher,
                    }
                )
                break
    if not rows:
        names = ", ".join(teachers)
        raise ValueError(
            f"pairs: no rationale of {names} states the gold answer and can get an error of kind "
            f"{kind!r}"
        )
    return rows


def _check_teachers(problems: Sequence[Problem], teachers: Collection[str]) -> None:
    known = {r.teacher for p in problems for r in p.rationales}
    for name in teachers:
        if name not in known:
            raise ValueError(f"teachers must be of {', '.join(sorted(known))}, got {name!r}")


def _spoilt(problem: Problem, completion: Text, kind: str, rng: random.Random) -> str | None:
    if not isinstance(completion, str):
        raise ValueError(f"{problem.question_id}: completion must be text, got messages")
    if problem.answer is None:
        raise ValueError(f"{problem.question_id}: answer must be given to plant an error, got none")
    return PLANTS[kind](completion, problem.answer, rng)


def _states_gold(problem: Problem, completion: Text) -> bool:
    assert problem.answer is not None
    stated = problem.domain.extract(text_of(completion))
    return problem.domain.matches(stated, problem.answer)
