"""The zoo's teachers make exactly the errors that their names describe."""

import re

import pytest

from compact.lab import zoo

EQUATION = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")


def equations_hold(completion: str) -> list[bool]:
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return [apply[op](int(a), int(b)) == int(c) for a, op, b, c in EQUATION.findall(completion)]


def final(completion: str) -> str:
    return completion.rsplit("The answer is ", 1)[1]


@pytest.fixture(scope="module")
def rows():
    return zoo.make_rows(tuple(zoo.TEACHERS), 100, seed=3)


def of(rows, teacher):
    return [row for row in rows if row["teacher"] == teacher]


@pytest.mark.parametrize("teacher", sorted(zoo.RIGHT))
def test_right_teachers_are_right(rows, teacher):
    for row in of(rows, teacher):
        checks = equations_hold(row["completion"])
        assert len(checks) in (2, 3) and all(checks)
        assert final(row["completion"]) == row["answer"]


def test_wrong_step_is_a_slip_or_a_misreading_and_the_answer_is_wrong(rows):
    broken = [equations_hold(row["completion"]).count(False) for row in of(rows, "wrong-step")]
    assert set(broken) == {0, 1}
    for row, right in zip(of(rows, "wrong-step"), of(rows, "good"), strict=True):
        assert final(row["completion"]) != row["answer"]
        lines = zip(row["completion"].split("\n"), right["completion"].split("\n"), strict=True)
        assert 1 <= sum(a != b for a, b in lines) <= 4


def test_right_answer_wrong_steps_keeps_the_answer(rows):
    for row in of(rows, "right-answer-wrong-steps"):
        assert final(row["completion"]) == row["answer"]
    for row, right in zip(of(rows, "right-answer-wrong-steps"), of(rows, "good"), strict=True):
        lines = zip(row["completion"].split("\n"), right["completion"].split("\n"), strict=True)
        assert sum(a != b for a, b in lines) == 2


def test_unrelated_is_right_about_something_else(rows):
    for row in of(rows, "unrelated"):
        assert all(equations_hold(row["completion"]))
        assert final(row["completion"]) != row["answer"]


def test_colluding_pair_agrees_on_a_wrong_answer(rows):
    for a, b in zip(of(rows, "colluding-a"), of(rows, "colluding-b"), strict=True):
        assert final(a["completion"]) == final(b["completion"]) != a["answer"]


@pytest.mark.parametrize("teacher", ["honest", "colluding-a", "colluding-b"])
def test_no_wording_of_zoo_b_gives_away_who_is_right(teacher):
    friendly = [
        row["completion"].startswith("We begin") for row in zoo.make_rows((teacher,), 400, seed=5)
    ]
    assert 0.4 < sum(friendly) / len(friendly) < 0.6


def test_specialist_is_right_exactly_on_additions(rows):
    seen = set()
    for row in of(rows, "specialist"):
        only_additions = not re.search(r"\d [-*] \d", row["completion"])
        assert (final(row["completion"]) == row["answer"]) == only_additions
        seen.add(only_additions)
    assert seen == {True, False}


def test_rows_depend_on_seed_problem_and_teacher_only(rows):
    few = zoo.make_rows(("unrelated", "good"), 10, seed=3)
    assert all(row in rows for row in few)
    assert zoo.make_rows(("good",), 10, seed=4) != of(few, "good")


def test_test_questions_are_not_training_questions():
    small = zoo.ZOOS["b"].sized(problems=200, questions=100)
    train = {row["prompt"] for row in small.rows(0)}
    test = [row["prompt"] for row in small.test_rows(0)]
    assert len(set(test)) == 100 and not train & set(test)


def test_unknown_teacher_is_named():
    with pytest.raises(ValueError, match="teachers: expected .* got \\['goood'\\]"):
        zoo.make_rows(("goood",), 1, seed=0)
