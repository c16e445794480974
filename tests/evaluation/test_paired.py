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
    Mean squares: 1/6 (2), 1/6 (1), 1/6 (2). Var = (1/6 + 1/6 - 1/6) / 6 = 1/36.
    Degrees of freedom: (1/6)^2 / ((1/6)^2 (1/2 + 1 + 1/2)) = 1/2, of which 1 is the least.
    """
    found = paired.effect(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert found.mean == pytest.approx(5 / 6)
    assert found.high - found.mean == pytest.approx(12.7062 / 6, rel=1e-4)


def test_equal_answers_leave_room_for_others_and_one_value_for_all():
    found = paired.effect(np.zeros((3, 4)))
    assert found.p == 1.0 and found.detectable == math.inf
    # Of 4 questions, none is another with a probability of 5% if .53 of all are.
    assert (1.0 - found.high) ** 4 == pytest.approx(0.05) and found.low == -found.high
    assert paired.effect(np.ones((3, 4))).p == 0.125  # four heads or four tails in a row
    assert paired.effect(np.ones((3, 50))).low > 0.94
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
