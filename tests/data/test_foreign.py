"""Rows as public data sets have them: their names of fields, their options, what would be lost."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from compact.data import importers, load_problems
from compact.data.foreign import prepared
from helpers.commands import run

command = functools.partial(run, "import")


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    return importers.import_files([(None, write(folder / "x.jsonl", *rows))], **settings).rows


# --- options ----------------------------------------------------------------------------------

AQUA = {
    "question": "A grocery sells 5 pens for 15. How much is one?",
    "options": ["A)2", "B)3", "C)5"],
    "rationale": "15 / 5 = 3, so it is option B.",
    "correct": "B",
}
SCIENCE_QA = {
    "question": "Which is a solid?",
    "choices": ["air", "a rock"],
    "answer": 1,
    "hint": "Every object is made of matter.",
    "image": None,
    "solution": "A rock keeps its shape.",
}
MMLU = {"question": "Which is 2?", "choices": ["1", "0", "2"], "answer": 2, "said": "It is (C)."}
ARC = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
    "answerKey": "2",
    "said": "Fire burns.",
}
MED_QA = {
    "question": "Which organ?",
    "options": {"A": "the heart", "B": "the liver"},
    "answer": "the liver",
    "said": "The liver.",
}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (AQUA, "A grocery sells 5 pens for 15. How much is one?\n(A) 2\n(B) 3\n(C) 5", "B"),
        (
            SCIENCE_QA,
            "Which is a solid?\nEvery object is made of matter.\n(A) air\n(B) a rock",
            "B",
        ),
        (MMLU, "Which is 2?\n(A) 1\n(B) 0\n(C) 2", "C"),
        (ARC, "Which is hot?\n(A) ice\n(B) fire", "B"),
        (MED_QA, "Which organ?\n(A) the heart\n(B) the liver", "B"),
    ],
)
def test_options_are_put_into_the_question(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str
) -> None:
    columns = ["said"] if "said" in row else []
    (problem,) = load_problems(imported(tmp_path, row, columns=columns))
    assert (problem.prompt, problem.answer) == (prompt, answer)
    assert problem.domain.name == "choice"
    if not columns:
        (rationale,) = problem.rationales
        assert problem.domain.extract(rationale.completion) == answer


def test_options_that_the_question_has_stay(tmp_path: Path) -> None:
    """Also those of a chat; there is no way to add them to one."""
    prompt = "Which?\n(A) ice\n(B) fire"
    row = {"prompt": prompt, "completion": "Fire is (B)", "options": ["ice", "fire"], "answer": 1}
    (found,) = imported(tmp_path, row)
    assert (found["prompt"], found["answer"]) == (prompt, "B")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "(B)"}]
    (found,) = imported(tmp_path, {"messages": turns, "choices": ["ice", "fire"]})
    assert found["prompt"] == prompt
    turns[0]["content"] = "Which?"
    with pytest.raises(ValueError, match="x.jsonl:1: the options must stand in the chat, .* lost"):
        imported(tmp_path, {"messages": turns, "choices": ["ice", "fire"]})


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["7", "8"], "(b)", "B"),
        (["7", "8"], "8", "B"),  # the text before the index
        (["7", "8"], "1", "B"),
        (["1", "0"], "1", "A"),
        (["1", "0"], 1, "B"),  # a number is an index
        ([7, 8], 0, "A"),
        (["ice", "fire"], "Because it burns.\n#### fire", "Because it burns.\n#### fire"),
    ],
)
def test_the_gold_answer_is_a_letter(options: list[Any], answer: Any, letter: str) -> None:
    row = prepared({"question": "Which?", "options": options, "answer": answer}, "x:1")
    assert row["answer"] == letter


@pytest.mark.parametrize("answer", ["C", 2, -1, "water"])
def test_an_answer_that_is_no_option(answer: Any) -> None:
    with pytest.raises(ValueError, match="x:1: the answer must be the letter, .* of 2 options, go"):
        prepared({"question": "Which?", "options": ["ice", "fire"], "answer": answer}, "x:1")


def test_other_fields_of_that_name_are_no_options() -> None:
    others = ({"temperature": 0.2}, ["one"], [{"a": 1}, {"b": 2}], "x", None, [])
    for value in (*others, {"label": 1, "text": 2}):
        row = {"question": "Which?", "options": value, "answer": "7"}
        assert prepared(row, "x:1") == row


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs", "image"])
def test_what_would_be_lost_is_refused(tmp_path: Path, field: str) -> None:
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    for row in ({"messages": turns}, {"prompt": "1?", "completion": "1"}):
        assert imported(tmp_path, row | {field: []})
        with pytest.raises(ValueError, match=f"x.jsonl:1: {field} must be empty, .* be lost"):
            imported(tmp_path, row | {field: [{"name": "search"}]})


# --- names of fields --------------------------------------------------------------------------


def test_names_of_other_data_sets(tmp_path: Path) -> None:
    """MATH's problem and solution, MetaMath's query and response."""
    (math,) = imported(
        tmp_path, {"problem": "1 + 1?", "solution": r"It is \boxed{2}.", "answer": 2}
    )
    assert (math["prompt"], math["completion"], math["answer"]) == (
        "1 + 1?",
        r"It is \boxed{2}.",
        "2",
    )
    row = {"type": "GSM", "query": "1 + 1?", "response": "The answer is: 2"}
    (meta,) = imported(tmp_path, row)
    assert (meta["prompt"], meta["completion"]) == ("1 + 1?", "The answer is: 2")
    (column,) = imported(tmp_path, row, columns=["response"])
    assert (column["completion"], column["teacher"]) == ("The answer is: 2", "response")


def test_the_first_name_that_holds_a_text_counts(tmp_path: Path) -> None:
    """s1K has `cot`, which is null, beside `solution`."""
    (row,) = imported(tmp_path, {"question": "1?", "cot": None, "solution": "So 1", "answer": "1"})
    assert row["completion"] == "So 1\nThe answer is 1"
    with pytest.raises(ValueError, match="x.jsonl:1: field 'cot' must hold text, got NoneType"):
        imported(tmp_path, {"question": "1?", "cot": None, "solution": ""})


def test_a_column_of_several_rationales_or_of_a_chat(tmp_path: Path) -> None:
    """s1K's thinking_trajectories, OpenR1's generations."""
    chat = [{"role": "assistant", "content": "So 1"}]
    rows: list[dict[str, Any]] = [
        {"question": "1?", "solution": "1", "generations": ["It is 1", "So 1", None], "chat": chat},
        {"question": "2?", "solution": "2", "generations": [], "chat": None},
    ]
    found = imported(tmp_path, *rows, columns=["generations", "chat"])
    assert [(row["teacher"], row["completion"]) for row in found] == [
        ("generations-1", "It is 1"),
        ("generations-2", "So 1"),
        ("chat", chat),
    ]


# --- rationales and gold answers --------------------------------------------------------------

LONG = "She has 3 pens and buys 4 more, which makes 7 pens in all. " * 4


@pytest.mark.parametrize("text", [LONG, "3 + 4 = 7\nSo she has 7 pens.", "=" * 60_000])
def test_a_text_without_a_marker_is_no_gold_answer(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long one is a rationale; a row of a question and a short answer is counted."""
    rows = [{"question": "3 + 4?", "answer": text}, {"question": "4 + 4?", "answer": "8"}]
    out = tmp_path / "out.jsonl"
    assert command(write(tmp_path / "x.jsonl", *rows), "--out", out) == 0
    (problem,) = load_problems(out)
    assert problem.answer is None and problem.rationales[0].completion == text.strip()
    assert "rows without a rationale: 1\n" in capsys.readouterr().out
    (row,) = imported(tmp_path, rows[0] | {"cot": "3 + 4 = 7"})
    assert "answer" not in row and row["completion"] == "3 + 4 = 7"


def test_rows_without_a_completion_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["1", None, ""]
    rows = [{"prompt": f"{i}?", "completion": text} for i, text in enumerate(said)]
    assert command(write(tmp_path / "x.jsonl", *rows), "--out", tmp_path / "out.jsonl") == 0
    assert "rows without a rationale: 2\n" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["answer", "label"])
def test_a_rationale_is_not_its_own_gold_answer(tmp_path: Path, column: str) -> None:
    row = {"prompt": "3 + 4?", column: "It makes 7", "small": "7"}
    for columns in ([column, "small"], [column]):
        found = imported(tmp_path, row, columns=columns)
        assert found[0]["completion"] == "It makes 7"
        assert not any("answer" in each for each in found)
    (small,) = imported(tmp_path, row | {column: 7}, columns=["small"])
    assert (small["completion"], small["answer"]) == ("7", "7")


@pytest.mark.parametrize(
    ("question", "cot", "answer", "appended"),
    [
        ("3 + 4?", "3 + 4 = 7", "7", True),
        ("3 + 4?", "3 + 4 = 8", "7", False),  # it would contradict itself
        ("3 + 4?", "Add them.", "7", True),
        ("Is 3 even?", "Odd numbers leave 1.", "no", True),
        ("Is 3 even?", "It is true, as 3 is 2 and 1. So yes, it is even.", "no", False),
        ("Which?\n(A) ice\n(B) fire", "Fire burns. Ice melts.", "B", True),  # a mention
        ("Which?\n(A) ice\n(B) fire", "Fire burns, so it is option (A).", "B", False),
        ("Where?", "It is the capital of France.", "Paris", True),
    ],
)
def test_the_gold_answer_is_added_unless_the_rationale_ends_in_another(
    question: str, cot: str, answer: str, appended: bool
) -> None:
    sample = importers.from_cot({"question": question, "cot": cot, "answer": answer}, "f:1")
    assert sample.completions == (f"{cot}\nThe answer is {answer}" if appended else cot,)
    assert sample.answer == answer


@pytest.mark.parametrize(
    ("prompt", "rationale", "gold"),
    [
        (
            "Jar A has 28 marbles. Jar B has 12 more than jar A. Jar C has twice as many as jar B. "
            "How many marbles are there in all?",
            "28 + 12 = 40\n40 * 2 = 80\n28 + 40 + 80 = 148\n#### 148",
            "148",
        ),
        ("Find a) the sum and b) the product of 2 and 3.", r"It is \boxed{x + 1}", "x + 1"),
        ("Which?\n(A) ice\n(B) fire", "#### B", "B"),
    ],
)
def test_labels_in_a_prompt_are_no_options_if_the_rationale_states_none(
    tmp_path: Path, prompt: str, rationale: str, gold: str
) -> None:
    row = {"question": prompt, "answer": rationale}
    (found,) = imported(tmp_path, row)
    assert found["answer"] == gold
    path = write(tmp_path / "gold.jsonl", {"instruction": prompt, "output": rationale})
    (key,) = importers.gold_answers(path).values()
    assert key == gold


def test_equal_rationales_of_a_teacher_are_found_up_to_white_space(tmp_path: Path) -> None:
    rows = [{"prompt": "1?", "completion": text} for text in ("so  1", "so 1 ", "so 2")]
    found = importers.import_files([(None, write(tmp_path / "x.jsonl", *rows))])
    assert [row["completion"] for row in found.rows] == ["so  1", "so 2"]
    assert (found.left_out, found.empty) == (1, 0)
