"""Answer checkers: what counts as right, and that one that hangs or dies costs one item."""

import os
import signal
import time

import pytest

from compact.checkers import CheckerPool, Judge, Verdict, check_choice, check_number, kind_of


@pytest.mark.parametrize(
    ("completion", "gold", "predicted", "correct"),
    [
        ("290 / 2 = 145. The answer is 145", "145", "145", True),
        ("The answer is $1,450.00.", "1450", "1450", True),
        ("So she has 12 apples left", "12", "12", True),
        ("The answer is 13", "12", "13", False),
        ("I do not know", "12", None, False),
        ("", "12", None, False),
    ],
)
def test_number(completion, gold, predicted, correct):
    assert check_number(completion, gold) == Verdict(predicted, correct)


@pytest.mark.parametrize(
    ("completion", "gold", "predicted", "correct"),
    [
        ("Birds fly. The answer is (B) a bird.", "B", "B", True),
        ("The answer is b.", "B", None, False),  # a bare small letter is a word, not an offer
        ("The answer is (b).", "(B)", "B", True),
        ("A bird is not C, so I choose D", "D", "D", True),
        ("A bird can fly. I think so.", "A", None, False),
        ("The answer is A", "A", "A", True),
        ("First I saw (A), but (C) fits", "C", "C", True),
    ],
)
def test_choice(completion, gold, predicted, correct):
    assert check_choice(completion, gold) == Verdict(predicted, correct)


def test_choice_refuses_a_gold_answer_that_is_no_letter():
    with pytest.raises(ValueError, match="choice letter from A to J, got '42'"):
        check_choice("The answer is B", "42")


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("12", "number"),
        ("-3.5", "number"),
        ("1,000", "number"),
        ("B", "choice"),
        ("(c)", "choice"),
        ("\\frac{1}{2}", "math"),
        ("x^2", "math"),
        ("New York", "number"),
    ],
)
def test_kind_follows_the_gold_answer(gold, kind):
    assert kind_of(gold) == kind


def test_mathematics_of_equal_value_is_right_and_a_real_hang_costs_one_item():
    judge = Judge(timeout=3.0)
    try:
        verdicts = judge(
            [
                ("Hence the answer is \\frac{2}{4}.", "\\frac{1}{2}"),
                ("So $\\boxed{x^2+2x+1}$", "(x+1)^2"),
                ("The answer is 9^{9^{9^9}}", "2^{9^{9^9}}"),  # math-verify computes it
                ("The answer is $3\\sqrt{2}$.", "\\sqrt{18}"),
                ("The answer is $3\\sqrt{2}$.", "\\sqrt{17}"),
                ("The answer is (B)", "B"),
                ("nothing", "x+1"),
            ]
        )
    finally:
        judge.close()
    assert [v.correct for v in verdicts] == [True, True, False, True, False, True, False]
    assert [v.note for v in verdicts] == ["", "", "timeout", "", "", "", ""]
    assert verdicts[-1].predicted is None


def check_hostile(completion: str, gold: str) -> Verdict:
    """Hangs deaf to signals, dies, raises or answers, as told."""
    if completion == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise ZeroDivisionError("no such number")
    return Verdict(completion, completion == gold)


def test_pool_survives_hanging_dying_and_raising_checkers():
    pool = CheckerPool(check_hostile, processes=2, timeout=1.0)
    try:
        told = ["1", "hang", "2", "die", "3", "raise", "hang", "4"]
        start = time.monotonic()
        verdicts = pool([(x, x) for x in told])
        elapsed = time.monotonic() - start
        again = pool([("5", "5")])
    finally:
        pool.close()
    notes = [
        "",
        "timeout",
        "",
        "checker died",
        "",
        "ZeroDivisionError: no such number",
        "timeout",
        "",
    ]
    assert [v.note for v in verdicts] == notes
    assert [v.correct for v in verdicts] == [n == "" for n in notes]
    assert again == [Verdict("5", True)]
    assert elapsed < 100, "two hangs of one second each, and new processes, took far too long"
    assert not any(w.process.is_alive() for w in pool.workers)


def test_judge_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="auto, number, choice, math, got 'maths'"):
        Judge("maths")
