"""Paired statistics against values computed by hand and against tables."""

import math
import statistics

import numpy as np
import pytest

from compact.evaluation import paired


def test_students_t_is_that_of_the_tables():
    assert paired.t_quantile(0.975, 1) == pytest.approx(12.7062, rel=1e-4)
    assert paired.t_quantile(0.975, 2) == pytest.approx(4.30265, rel=1e-4)
    assert paired.t_quantile(0.975, 10) == pytest.approx(2.22814, rel=1e-4)
    assert paired.t_quantile(0.8, 5) == pytest.approx(0.91954, rel=1e-4)
    assert paired.t_quantile(0.975, 1e9) == pytest.approx(1.96, rel=1e-3)
    assert paired.two_sided(0.0, 3) == pytest.approx(1.0, abs=1e-6)
    assert paired.two_sided(1.0, 1) == pytest.approx(0.5, abs=1e-6)  # Cauchy


def test_holm_by_hand():
    # Sorted .01, .02, .03, .9 times 4, 3, 2, 1: .04, .06, .06 and .9; none below an earlier one.
    assert paired.holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert paired.holm([0.7, 0.8]) == [1.0, 1.0]
    assert paired.holm([]) == []


def test_one_seed_is_the_t_test_over_questions():
    values = [1.0, 0.0, 1.0, 1.0, -1.0]
    found = paired.effect(np.array([values]))
    error = statistics.stdev(values) / math.sqrt(5)
    assert found.mean == pytest.approx(0.4)
    assert found.high - found.mean == pytest.approx(2.7764 * error, rel=1e-4)
    assert found.p == pytest.approx(paired.two_sided(0.4 / error, 4))
    assert found.detectable == pytest.approx((2.7764 + 0.94096) * error, rel=1e-4)


def test_two_seeds_by_hand():
    """[[1, 0, 1], [1, 1, 1]]: means of questions 1, 1/2, 1, of seeds 2/3, 1, of all 5/6.

    Squares: questions 2 (1/36 + 4/36 + 1/36) = 1/3, seeds 3 (2/36) = 1/6, rest 1/3.
    Mean squares: 1/6 (2), 1/6 (1), 1/6 (2). The median of F is 1 with (2, 2) degrees of freedom and
    .67 with (1, 2), so the questions are left out: Var = (1/6) / 6 = 1/36 with 1 degree of freedom.
    """
    found = paired.effect(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert found.mean == pytest.approx(5 / 6)
    assert found.high - found.mean == pytest.approx(12.7062 / 6, rel=1e-4)


def layout(ms_q, ms_s, ms_e, seeds=3, questions=5):
    """Values with these mean squares and mean .1."""
    q, s = np.arange(questions) - (questions - 1) / 2, np.arange(seeds) - (seeds - 1) / 2
    parts = [
        (ms_q, np.tile(q, (seeds, 1)), questions - 1),
        (ms_s, np.outer(s, q * 0 + 1), seeds - 1),
    ]
    parts.append((ms_e, np.outer(s, q), (questions - 1) * (seeds - 1)))
    return 0.1 + sum(x * math.sqrt(ms * df / np.square(x).sum()) for ms, x, df in parts)


@pytest.mark.parametrize(
    ("squares", "variance", "df"),
    [
        # The median of F is about .94 with (4, 8) degrees of freedom, .78 with (2, 8).
        ((3.0, 0.7, 1.0), 3.0, 4),  # no effect of seeds
        ((0.9, 3.0, 1.0), 3.0, 2),  # none of questions
        ((0.5, 0.5, 1.0), 1.0, 8),  # none of both
        ((3.0, 2.0, 1.0), 4.0, 4.0 / (3 / 4 + 2 / 2 - 1 / 8)),
        ((3.0, 0.9, 1.0), 3.0, 3.0 / (3 / 4 + 1 / 2 - 1 / 8)),  # kept: counts as MS_e at least
    ],
)
def test_a_factor_without_effect_is_left_out(squares, variance, df):
    found = paired.effect(layout(*squares))
    error = math.sqrt(variance / 15)
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.mean == pytest.approx(paired.t_quantile(0.975, df) * error, rel=1e-4)
    assert found.p == pytest.approx(paired.two_sided(0.1 / error, df))


@pytest.mark.parametrize(
    ("seed_sd", "true", "least", "most"),
    # The shares of docs/results/paired.md, three standard errors of 200 draws either way.
    [(0.0, 0.0, 0.0, 0.07), (0.03, 0.0, 0.0, 0.1), (0.06, 0.0, 0.0, 0.1), (0.0, 0.05, 0.48, 1.0)],
)
def test_three_seeds_find_a_difference_and_invent_none(seed_sd, true, least, most):
    random = np.random.default_rng(1)
    found = 0
    for _ in range(200):
        values = true + seed_sd * random.normal(size=(3, 1)) + 0.374 * random.normal(size=(3, 300))
        found += paired.effect(values).p < 0.05
    assert least <= found / 200 <= most


def test_equal_answers_leave_room_for_others_and_one_value_for_all():
    found = paired.effect(np.zeros((3, 4)))
    assert found.p == 1.0 and found.detectable == math.inf
    # Of 4 questions, none is another with a probability of 5% if .53 of all are.
    assert (1.0 - found.high) ** 4 == pytest.approx(0.05) and found.low == -found.high
    assert paired.effect(np.ones((3, 4))).p == 0.125  # four heads or four tails in a row
    assert paired.effect(np.ones((3, 50))).low > 0.94
    # Values may be a list, and differ by rounding.
    equal = paired.effect([0.1 + 0.2, 0.3])
    assert equal.high - 0.3 == pytest.approx(1 - 0.05**0.5) == 0.3 - equal.low
    assert paired.shares(equal) == (0.0, 1.0) and paired.shares(equal, -1.0)[0] == equal.low
    assert paired.effect(np.ones((1, 1)))[1:] == (-math.inf, math.inf, 1.0, math.inf)


def test_intervals_cover_the_truth_over_questions_and_seeds():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        questions, seeds = random.normal(size=40), random.normal(size=(3, 1)) * 0.2
        found = paired.effect(questions + seeds + random.normal(size=(3, 40)))
        hits += found.low <= 0.0 <= found.high
    assert hits >= 88  # 95% of 100 less three standard errors


def runs(**right):
    return [
        {"arm": arm, "seed": seed, "right": {"t": text, "development": text[:2]}}
        for arm, texts in right.items()
        for seed, text in enumerate(texts)
    ]


def test_csv_round_trip_and_rows(tmp_path):
    made = runs(uniform=["1100", "1000"], robust=["1110", "1010"])
    file = tmp_path / "paired.csv"
    file.write_text(paired.as_csv(made))
    answers = paired.read_csv(file)
    assert answers["t"]["robust"].tolist() == [[1, 1, 1, 0], [1, 0, 1, 0]]
    rows = paired.paired_rows(paired.with_best_single(answers))
    assert [(row["test"], row["arm"]) for row in rows] == [("t", "uniform"), ("t", "robust")]
    difference, p = rows[1]["against"]["uniform"]
    assert difference.mean == pytest.approx(0.25)
    assert p == difference.p  # one arm: nothing to adjust
    assert "| t | robust | 0.625 (" in paired.as_markdown(rows)
    named = paired.as_markdown([row | {"test": "a|b"} for row in rows])
    assert "\n| a\\|b | robust | 0.625 (" in named
    file.write_text("arm,seed,test,right\nuniform,0,t,10x\n")
    with pytest.raises(ValueError, match=r"paired.csv:2: expected arm, seed, test, right"):
        paired.read_csv(file)


def test_best_single_is_chosen_on_the_development_questions():
    made = runs(**{"single:a": ["1100"], "single:b": ["1011"], "uniform": ["1111"]})
    arms = paired.with_best_single(paired.answers_of(made))
    assert list(arms) == ["t"]
    assert arms["t"]["best single (a)"].mean() == 0.5  # b is better on the test
    made[0]["right"] = {"t": "11"}
    with pytest.raises(ValueError, match="4 questions|2 questions"):
        paired.answers_of(made)


def test_best_single_does_not_count_twice_in_the_adjustment():
    singles = {"single:a": ["11110000"], "single:b": ["10101010"]}
    made = runs(uniform=["00001000"], **singles)
    answers = paired.answers_of(made)
    alone = paired.paired_rows({"t": answers["t"]})
    rows = paired.paired_rows(paired.with_best_single(answers))
    assert [row["arm"] for row in rows] == ["uniform", *singles, "best single (a)"]
    assert rows[:3] == alone
    assert rows[3]["against"] == rows[1]["against"]
    tested = [row["against"]["uniform"] for row in rows[1:3]]
    assert [p for _, p in tested] == paired.holm([found.p for found, _ in tested])
