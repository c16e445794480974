"""Checks of steps: what fires, in which words, and how much it says against a base rate."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact.validity.checks import MISREAD, MOST, Outcome, base_rates, check, evidence

PROMPT = "Mia has 3 apples and buys 4 more, then eats 5."


def case(*texts: list[str], prompt: str = PROMPT, gold: str | None = None) -> Any:
    rationales = [
        SimpleNamespace(teacher=f"t{k}", text=" ".join(steps), step_texts=tuple(steps), answer=None)
        for k, steps in enumerate(texts)
    ]
    return SimpleNamespace(prompt=prompt, gold=gold, kind="number", rationales=rationales)


def failures(problem: Any, name: str, k: int = 0) -> list[tuple[int, str]]:
    return list(check(problem, [1.0] * len(problem.rationales))[k][name].failures)


@pytest.mark.parametrize(
    ("where", "checked"),
    [
        ("3 * 5 = 1 (mod 7)", False),
        (r"Work \pmod{7}.", False),
        ("In base 2:", False),
        ("Write it in binary.", False),
        ("Convert it to base-8.", False),
        ("A triangle has base 6 and height 4.", True),
        ("It is a binary choice on a base-10 scale.", True),
    ],
)
def test_other_arithmetic_is_not_checked(where: str, checked: bool) -> None:
    assert len(failures(case(["10 + 10 = 100", where]), "arithmetic")) == checked


def test_an_equation_that_does_not_hold_is_named() -> None:
    found = failures(case(["3 + 4 = 7 apples", "7 - 5 = 3"]), "arithmetic")
    assert found == [(1, "7 - 5 = 3 does not hold")]


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        (["3 + 4 = 7", "7 - 5 = 2"], 0),  # given and computed
        (["3 + 4 = 7", "so 11 remain"], 1),  # from nowhere
        (["3 + 6 = 9", "9 - 5 = 4"], 2),  # 6 is nobody's, and what is computed from it, too
        (["half of it and 100 percent"], 0),
    ],
)
def test_numbers_from_nowhere(steps: list[str], count: int) -> None:
    others = [["3 + 4 = 7", "7 - 5 = 2"]] * 2
    assert len(failures(case(steps, *others), "numbers")) == count


@pytest.mark.parametrize(
    ("prompt", "steps", "count"),
    [
        ("20% off $50", ["50 * 0.2 = 10", "50 - 10 = 40"], 0),
        ("20% off $50", ["He pays 80%.", "50 * 0.8 = 40"], 0),
        ("A tip of 15% on $40", ["40 * 1.15 = 46"], 0),
        ("20% off $50", ["He pays 85%.", "50 * 0.85 = 42.5"], 1),
        ("20% off $50", ["50 * 0.3 = 15"], 2),
        ("He has 5 million and spends 2 million", ["5,000,000 - 2,000,000 = 3,000,000"], 0),
        ("He has 5 million and spends 2 million", ["5 - 2 = 3", "3 million are left"], 0),
        ("He walks 3 km", ["that is 3000 m in 60 / 12 = 5 minutes"], 0),
        ("He works 5 days", ["5 * 24 = 120 hours"], 0),
        ("He works 5 days", ["24 hours"], 1),
        ("60 of 90", ["9 more"], 1),
        ("half of 8", ["he has 93 or 88 or 40"], 3),  # no constant is a percentage
    ],
)
def test_numbers_that_are_rewritten(prompt: str, steps: list[str], count: int) -> None:
    """Percentages, and what they leave; thousands; parts of a day as factors."""
    problem = case(steps, ["no numbers"], prompt=prompt)
    assert len(failures(problem, "numbers")) == count


def test_a_number_that_another_rationale_has_is_supported() -> None:
    problem = case(["she has 37"], ["he has 37"], ["3 + 4 = 7"])
    assert failures(problem, "numbers") == []
    outcome = check(problem, [1.0, 0.0, 1.0])[0]["numbers"]  # a rationale that does not count
    assert [step for step, _ in outcome.failures] == [0]


@pytest.mark.parametrize("count", [3, 30])
def test_one_other_supports_a_number_however_many_there_are(count: int) -> None:
    others = [[f"3 + 4 = 7, {'so ' * k}"] for k in range(count - 2)]
    assert failures(case(["she has 37"], ["he has 37"], *others), "numbers") == []
    found = failures(case(["she has 37"], *others), "numbers")
    what = "37 is neither given nor computed, and no other rationale that counts has it"
    assert found == [(0, what)]


@pytest.mark.parametrize(("weight", "count"), [(1.0, 0), (0.5, 0), (0.4, 1), (0.0, 1)])
def test_a_rationale_that_is_much_less_likely_supports_nothing(weight: float, count: int) -> None:
    problem = case(["she has 37"], ["he has 37"], ["3 + 4 = 7"])
    outcome = check(problem, [1.0, weight, 1.0])[0]["numbers"]
    assert len(outcome.failures) == count


def test_a_copy_supports_nothing() -> None:
    problem = case(["she has 37"], ["she has 37"], ["3 + 4 = 7"])
    assert len(failures(problem, "numbers")) == len(failures(problem, "numbers", 1)) == 1
    assert failures(case(["she has 37"], ["she has 37"]), "numbers") == []  # no other text


def test_the_gold_answer_is_known() -> None:
    others = [["3 + 4 = 7"]]
    assert failures(case(["so it is 42"], *others, gold="42"), "numbers") == []


def test_numbers_in_words_are_given_and_labels_are_no_numbers() -> None:
    prompt = "Twenty-five boxes of a dozen eggs each, and a 6-ounce cup."
    steps = ["Q7.", "25 * 12 = 300 eggs", "Step 9: 6 ounces"]
    assert failures(case(steps, ["none"], prompt=prompt), "numbers") == []


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ("A tank of 20 liters is 3/4 full.", "0.75 * 20 = 15"),
        ("Half of 30 cookies are gone.", "30 * 0.5 = 15"),
        ("Two thirds of 30 are red.", "2/3 * 30 = 20"),
        ("A fifth of 30 are red.", "80% of 30"),
        ("Ann tripled her 15 beads.", "15 * 3 = 45"),
    ],
)
def test_a_given_fraction_in_another_form_is_known(given: str, step: str) -> None:
    assert failures(case([step], ["none"], prompt=given), "numbers") == []


def test_without_others_nothing_comes_from_nowhere() -> None:
    assert failures(case(["so it is 42"]), "numbers") == []


def of(count: int, chances: int, name: str = "arithmetic") -> dict[str, Outcome]:
    failed = Outcome(chances, tuple((0, "") for _ in range(count)))
    return {"arithmetic": Outcome(0, ()), "numbers": Outcome(0, ()), name: failed}


def test_rare_failures_say_more_than_common_ones() -> None:
    rates = {"arithmetic": 0.001, "numbers": 0.05}
    rare = evidence(of(1, 3), rates)["arithmetic"]
    common = evidence(of(1, 3), {**rates, "arithmetic": 0.3})["arithmetic"]
    assert rare == MOST > common > 0
    assert evidence(of(0, 3), rates)["arithmetic"] == 0.0
    many = evidence(of(1, 1000), {**rates, "arithmetic": 0.01})["arithmetic"]
    assert many < 1e-3  # in a thousand equations one failure is no surprise


def test_wrong_equations_that_are_common_are_no_misreadings() -> None:
    """Where half of the equations fail, the teachers err."""
    rates = {"arithmetic": 0.5, "numbers": 0.5}
    assert (
        evidence(of(1, 2), rates)["arithmetic"]
        == evidence(of(1, 2), {**rates, "arithmetic": MISREAD})["arithmetic"]
    )
    assert (
        evidence(of(1, 2), rates)["arithmetic"]
        > 3 * evidence(of(1, 2, "numbers"), rates)["numbers"]
    )


@given(st.integers(1, 30), st.floats(1e-6, 20))
def test_evidence_is_the_tail_of_a_poisson_variable(count: int, mean: float) -> None:
    found = evidence(of(count, 1, "numbers"), {"arithmetic": 0.05, "numbers": mean})["numbers"]
    terms = [math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(count, 200)]
    assert found == pytest.approx(min(-math.log(min(sum(terms), 1.0)), MOST), rel=1e-6, abs=1e-6)


def test_no_more_failures_than_expected_are_no_evidence() -> None:
    rates = {"arithmetic": 0.05, "numbers": 0.8}
    assert evidence(of(100, 1000, "numbers"), rates)["numbers"] == 0.0
    assert evidence(of(1000, 1000, "numbers"), rates)["numbers"] == MOST


@pytest.mark.parametrize(
    ("count", "mean"), [(5, 900.0), (1, 1000.0), (100, 1500.0), (0, 1e6), (900, 1e6)]
)
def test_far_less_failures_than_expected_are_no_evidence(count: int, mean: float) -> None:
    """The terms of the sum underflow there."""
    rates = {"arithmetic": 0.05, "numbers": mean / 1e6}
    assert evidence(of(count, 1_000_000, "numbers"), rates)["numbers"] == 0.0


def test_far_more_failures_than_expected_are_all_the_evidence() -> None:
    rates = {"arithmetic": 0.05, "numbers": 1e-6}
    for count in (5, 900, 2000):
        assert evidence(of(count, 1, "numbers"), rates)["numbers"] == MOST


def test_base_rates_start_from_a_prior_and_follow_the_data() -> None:
    assert base_rates([])["arithmetic"] == pytest.approx(0.01)
    rates = base_rates([(of(500, 1000), 1.0)])
    assert rates["arithmetic"] == pytest.approx(0.5, abs=0.02)
    assert base_rates([(of(500, 1000), 0.0)])["arithmetic"] == pytest.approx(0.01)
