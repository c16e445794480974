"""The vote of stated answers: equal votes, trust learned over the data, gold answers, copies."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from compact.validity import votes
from compact.validity.cases import shares


def case(answers: dict[str, str | None], gold: str | None = None, copies: bool = False) -> Any:
    """A problem whose teachers state these answers."""
    rationales = [
        SimpleNamespace(teacher=t, text=f"{'' if copies else t} {a}", step_texts=(), answer=a)
        for t, a in answers.items()
    ]
    return SimpleNamespace(prompt="", gold=gold, kind="number", rationales=rationales)


def answer_probabilities(problem: Any, weight: dict[str, float]) -> list[float]:
    return votes.answer_probabilities(problem, shares(problem), weight)


def learn_weights(problems: list[Any]) -> dict[str, float]:
    return votes.learn_weights(problems, [shares(problem) for problem in problems])


def skilled(seed: int, count: int, skill: dict[str, float], gold: bool = False) -> list[Any]:
    """Problems of gold answer "r" that teachers find with their skill; wrong answers spread."""
    rng = random.Random(seed)
    return [
        case(
            {t: "r" if rng.random() < s else rng.choice("abcd") for t, s in skill.items()},
            "r" if gold else None,
        )
        for _ in range(count)
    ]


def test_equal_weights_are_the_formula() -> None:
    found = answer_probabilities(case({"a": "1", "b": "1", "c": "2", "d": None}), {})
    scale = 1 + math.exp(2) + 2 * math.exp(1)
    wanted = [math.exp(2) / scale] * 2 + [math.exp(1) / scale] * 2
    assert found == pytest.approx(wanted)


def test_any_number_of_rationales() -> None:
    """The sum of a thousand votes is beyond the range of exp."""
    answers: dict[str, str | None] = {f"t{k}": "1" if k % 3 else "2" for k in range(1000)}
    found = answer_probabilities(case(answers), dict.fromkeys(answers, 4.0))
    assert found[1] == pytest.approx(1.0) and found[0] == pytest.approx(0.0)
    assert all(map(math.isfinite, learn_weights([case(answers)]).values()))


def test_a_gold_answer_decides() -> None:
    assert answer_probabilities(case({"a": "1", "b": "2", "c": None}, "2"), {}) == [0.0, 1.0, 0.0]


def test_copies_of_a_text_are_one_vote() -> None:
    found = answer_probabilities(case({"a": "1", "b": "1", "c": "2"}, copies=True), {})
    assert found[0] == pytest.approx(found[2])


@pytest.mark.parametrize("gold", [False, True])
def test_good_teachers_get_more_weight(gold: bool) -> None:
    skill = {"good": 0.95, "fair": 0.7, "poor": 0.3, "bad": 0.2}
    weight = learn_weights(skilled(0, 300, skill, gold))
    assert weight["good"] > weight["fair"] > weight["poor"] >= weight["bad"]


def test_a_good_teacher_outvotes_two_bad_ones() -> None:
    problems = skilled(1, 300, {"good": 0.95, "fair": 0.8, "poor": 0.3, "bad": 0.3})
    found = answer_probabilities(
        case({"good": "1", "poor": "2", "bad": "2"}), learn_weights(problems)
    )
    assert found[0] > found[1]


@pytest.mark.parametrize("seed", range(5))
def test_teachers_that_do_not_differ_have_equal_votes(seed: int) -> None:
    weight = learn_weights(skilled(seed, 60, dict.fromkeys("abcde", 0.6)))
    assert max(weight.values()) - min(weight.values()) < 1e-9


@pytest.mark.parametrize("count", [1, 2])
def test_a_vote_or_two_do_not_tell_teachers_apart(count: int) -> None:
    weight = learn_weights([case({"a": "1", "b": "1", "c": "2"})] * count)
    assert max(weight.values()) - min(weight.values()) < 1e-9


def test_teachers_that_are_always_right_and_always_wrong_are_told_apart() -> None:
    """There is no variance within them."""
    weight = learn_weights([case({"a": "1", "b": "1", "c": "2"}, "1")] * 40)
    assert weight["a"] == weight["b"] > 2 * weight["c"]


def test_gold_answers_of_some_problems_teach_about_the_others() -> None:
    """A wrong majority agrees with itself; gold answers on a part of the data expose it."""
    rng = random.Random(0)

    def wrong_majority(gold: str | None) -> Any:
        shared = rng.choice("abcd")
        return case({"good": "r", "x": shared, "y": shared}, gold)

    problems = [wrong_majority("r") for _ in range(60)] + [wrong_majority(None) for _ in range(60)]
    weight = learn_weights(problems)
    found = answer_probabilities(problems[-1], weight)
    assert found[0] > found[1]


def test_nothing_to_learn_from() -> None:
    assert set(learn_weights([case({"a": "1"})])) == {"a"}
    assert learn_weights([]) == {}
    weight = learn_weights([case({"a": None, "b": None})])
    assert weight["a"] == weight["b"]


@pytest.mark.parametrize("gold", [False, True])
def test_wrong_arithmetic_costs_votes_only_where_it_goes_with_unlikely_answers(gold: bool) -> None:
    problems = skilled(2, 200, {"a": 0.9, "b": 0.9, "c": 0.9, "d": 0.4}, gold)
    own = [shares(problem) for problem in problems]

    def vote_if(*wrong: bool) -> float:
        return votes.vote_of_wrong(problems, own, [wrong] * len(problems))

    assert 0.3 < vote_if(False, False, False, True) < 0.8
    assert vote_if(True, False, False, False) > 0.95
    assert vote_if(False, False, False, False) == 1.0
    assert votes.lowered([1.0, 0.5], [True, False], 0.5) == [0.5, 0.5]
