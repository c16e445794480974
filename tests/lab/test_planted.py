"""Planted errors are in the right places, and the AUC is right."""

import json
import random

import pytest

from compact.answers import extract_answer
from compact.commands.cli import main
from compact.lab.planted import PLANTS
from compact.text.equations import numbers
from compact.text.steps import find_marker, split_steps
from helpers.commands import fails

TEXT = "8 people + 12 people = 20 people. Then 20 people - 3 people = 17 people. The answer is 17"


@pytest.mark.parametrize("seed", range(20))
def test_hidden_keeps_the_answer_and_changes_a_number_everywhere(seed):
    spoilt = PLANTS["hidden"](TEXT, "17", random.Random(seed))
    assert spoilt != TEXT
    assert extract_answer(spoilt) == "17"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "text",
    [
        "1. He has 5 apples.\n2. He buys 7 more.\nThe answer is 12",
        "Step 1: He has 5 apples. Step 2: He buys 7. The answer is 12",
        "**Step 1:** At 10:30 he has 5 apples.\n**Step 2:** He buys 7.\nThe answer is 12",
        "1. He has 1 apple.\n2. He buys 2 more.\nThe answer is 3",
    ],
)
def test_a_planted_error_is_no_other_list_number(text, seed):
    """A number of a step changes; the numbers of the steps stay."""
    spoilt = PLANTS["hidden"](text, "12", random.Random(seed))
    before, after = (
        [numbers(step.text) for step in split_steps(t[: find_marker(t)])] for t in (text, spoilt)
    )
    assert before != after
    for mark in ("1. He", "2. He", "Step 1:", "Step 2:", "10:30"):
        assert (mark in spoilt) == (mark in text)


def test_numbers_after_an_inner_marker_are_changed_too():
    """The steps end there, but the number is no list number."""
    text = "He has some.\nFinal Answer: How many? He has 12 more, 5 before. The answer is 17"
    spoilt = PLANTS["hidden"](text, "17", random.Random(0))
    assert spoilt is not None and spoilt != text and spoilt.endswith("The answer is 17")


def test_a_text_of_list_numbers_alone_gets_no_error():
    assert PLANTS["hidden"]("1. Think.\n2. Add.\nThe answer is 5", "5", random.Random(0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_carried_reaches_the_answer(seed):
    spoilt = PLANTS["carried"](TEXT, "17", random.Random(seed))
    assert extract_answer(spoilt) != "17"
    assert spoilt.rsplit(" = ", 1)[1].split()[0] == extract_answer(spoilt)


@pytest.mark.parametrize(
    ("right", "gold", "wrong"),
    [
        (TEXT, "17", None),  # 12 - 8 would do, but 8 - 12 comes first
        (
            "12 people + 8 people = 20 people. Then 20 people - 3 people = 17. The answer is 17",
            "17",
            "12 people - 8 people = 4 people. Then 4 people + 3 people = 7. The answer is 7",
        ),
        ("7 − 4 = ? The answer is 3", "3", "7 + 4 = ? The answer is 11"),
        ("( 9.0 - 2.0 ) * 3.0 = 21. The answer is 21.0", "21", None),  # not read as one equation
        ("8 - 4 = 4. The answer is 4", "4", None),  # which 4 is the result?
        ("6 * 7 = 42. The answer is 42", "42", None),
    ],
)
def test_operation_swaps_sums_and_differences(right, gold, wrong):
    assert PLANTS["operation"](right, gold, random.Random(0)) == wrong


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("3 + 4 = 7. So 7 - 2 = 5. The answer is 5", "3 - 4 = 7. So 7 + 2 = 5. The answer is 5"),
        ("7 − 4 = ? The answer is 3", "7 + 4 = ? The answer is 3"),
        ("6 * 7 = 42. The answer is 42", None),
        ("5 - 0 = 5. The answer is 5", None),  # still true
        ("2 + 2 = 5. The answer is 5", None),  # was false already
    ],
)
def test_sign_swaps_and_keeps_the_results(right, wrong):
    assert PLANTS["sign"](right, "5", random.Random(0)) == wrong


def test_nothing_to_change_is_none():
    assert PLANTS["hidden"]("No number here. The answer is 17", "17", random.Random(0)) is None
    assert PLANTS["carried"]("The answer is 17", "17", random.Random(0)) is None


def test_a_file_whose_teacher_misleads(tmp_path, capsys):
    """All rationales of the named teachers that can be changed are changed, and nothing else."""
    rows = [
        {"question_id": "q", "prompt": "How many?", "teacher": t, "completion": c, "answer": "17"}
        for t, c in (("a", TEXT), ("b", TEXT), ("c", "The answer is 17"))
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "misled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["planted", str(file), "--teachers", "b", "c", "--out", str(out)]
    assert main(argv) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"] != TEXT for row in found] == [False, True, True]
    assert found[0] == rows[0] | {"right": True} and found[2] == rows[2] | {"right": True}
    assert found[1] == rows[1] | {"completion": found[1]["completion"], "right": False}
    assert "an error in 1 of 2 rationales of b, c" in capsys.readouterr().out
    line = fails(capsys, "planted", str(file), "--teachers", "d", "--out", str(out))
    assert "teachers must be of a, b, c, got 'd'" in line
    line = fails(capsys, "planted", str(file), "--teachers", "b", "--out", str(file))
    assert "--out must be another file" in line


def test_pairs_of_a_right_rationale_and_its_copy_with_an_error(tmp_path, capsys):
    first = "12 people + 8 people = 20 people. Then 20 people - 3 people = 17. The answer is 17"
    rows = [
        {"question_id": q, "prompt": "How many?", "teacher": t, "completion": c, "answer": "17"}
        for q, t, c in (
            ("q", "a", first),
            ("q", "b", "7 + 9 = 16. The answer is 16"),  # wrong already
            ("r", "a", "The answer is 17"),  # nothing to swap
            ("s", "c", first),  # of a teacher that is not asked for
        )
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["planted", str(file), "--kind", "operation", "--pairs", "--out", str(out)]
    assert main([*given, "--teachers", "a", "b"]) == 0
    assert "a pair for 1 of 3 problems, from a, b" in capsys.readouterr().out
    (pair,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert pair == {
        "question_id": "q",
        "prompt": "How many?",
        "chosen": first,
        "rejected": PLANTS["operation"](first, "17", random.Random(0)),
        "teacher": "a",
    }
    assert "teachers must be of a, b, c" in fails(capsys, *given, "--teachers", "nobody")
    assert "no rationale of b states the gold" in fails(capsys, *given, "--teachers", "b")


def test_numbers_keep_their_commas():
    spoilt = PLANTS["operation"]("1,200 + 2,300 = 3,500. The answer is 3,500", "3500", None)
    assert spoilt is None  # 1,200 - 2,300 is negative
    spoilt = PLANTS["operation"]("5,200 - 2,300 = 2,900. The answer is 2,900", "2900", None)
    assert spoilt == "5,200 + 2,300 = 7,500. The answer is 7,500"
