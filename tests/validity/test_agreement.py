"""The agreement of the texts: against its formula, and in time that follows the number of texts."""

from __future__ import annotations

import math
import random
import re
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from compact.text.equations import numbers
from compact.validity import judge
from compact.validity.agreement import agreement, document_frequencies


def problem(count: int, seed: int, answers: tuple[str, ...], gold: str | None = None) -> Any:
    """A problem whose texts share numbers and words; one in five is a copy."""
    rng, of_answers = random.Random(seed), random.Random(seed)
    found: list[Any] = []
    for k in range(count):
        a, b = rng.randint(2, 30), rng.randint(2, 30)
        words = " ".join(f"{rng.choice('abcdefgh')}{rng.choice('klmnop')}" for _ in range(6))
        steps = (f"{a} + {b} = {a + b} {words}", rng.choice(["so", f"{b} - 1 = {b - 1}"]))
        copied = rng.choice(found) if found and rng.random() < 0.2 else None
        one = SimpleNamespace(
            teacher=f"t{k}",
            text=copied.text if copied else " ".join(steps),
            step_texts=copied.step_texts if copied else steps,
            answer=copied.answer if copied else of_answers.choice(answers),
        )
        found.append(one)
    return SimpleNamespace(prompt="How many?", gold=gold, kind="number", rationales=found)


def by_hand(case: Any, weights: list[float]) -> list[float]:
    """The formula, pair by pair."""
    total = len(case.rationales)

    def words(text: str) -> list[str]:
        return re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?", text.lower())

    documents = Counter(w for r in case.rationales for w in set(words(r.text)))

    def vector(text: str) -> dict[str, float]:
        counts = Counter(words(text))
        found = {w: (1 + math.log(n)) * math.log(total / documents[w]) for w, n in counts.items()}
        length = math.sqrt(sum(x * x for x in found.values()))
        return {w: x / length for w, x in found.items()}

    def all_numbers(r: Any) -> set[str]:
        return {n for text in (*r.step_texts, r.answer or "") for n in numbers(text)}

    def similarity(a: Any, b: Any) -> float:
        either = all_numbers(a) | all_numbers(b)
        shared = len(all_numbers(a) & all_numbers(b)) / len(either)
        if numbers(a.answer or "") and numbers(b.answer or ""):
            return shared
        one, other = vector(a.text), vector(b.text)
        return 0.5 * (shared + sum(x * other.get(w, 0.0) for w, x in one.items()))

    scores = []
    for r in case.rationales:
        pairs = zip(case.rationales, weights, strict=True)
        others = [(w, similarity(r, o)) for o, w in pairs if o.text != r.text]
        whole = sum(w for w, _ in others)
        scores.append(sum(w * s for w, s in others) / whole if whole else 1.0)
    return scores


@pytest.mark.parametrize("answers", [("7", "8"), ("yes", "no"), ("7", "yes")])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_agreement_is_its_formula(answers: tuple[str, ...], count: int) -> None:
    for seed in range(5):
        case = problem(count, seed, answers)
        weights = [random.Random(seed + k).choice([0.0, 0.1, 1.0]) for k in range(count)]
        found = agreement(case, weights, document_frequencies([case]))
        assert found == pytest.approx(by_hand(case, weights), abs=1e-12)


def test_equal_numbers_are_ties_in_any_order() -> None:
    """Sums that depended on the order would break them."""
    case = problem(12, 1, ("7",))
    for k, r in enumerate(case.rationales):
        r.text, r.step_texts = f"text {k}", (case.rationales[k % 3].step_texts[0],)
    found = agreement(case, [0.1, 0.7, 0.3] * 4, document_frequencies([case]))
    assert len(set(found)) == 3


@pytest.mark.parametrize("gold", ["7", None])
@pytest.mark.parametrize("answers", [("7", "8"), ("yes", "no"), tuple(map(str, range(9999)))])
def test_time_follows_the_number_of_rationales(answers: tuple[str, ...], gold: str | None) -> None:
    """Eight times as many take about eight times as long, not 64 times."""

    def seconds(count: int) -> float:
        case = problem(count, 1, answers, gold)
        judge([case])  # numbers and equations are kept
        found = []
        for _ in range(3):
            start = time.process_time()
            judge([case])
            found.append(time.process_time() - start)
        return min(found)

    assert seconds(1200) < 28 * seconds(150)
