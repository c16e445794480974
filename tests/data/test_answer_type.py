"""The field answer_type: what it takes, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compact import load_problems, load_questions


def row(**more: object) -> dict[str, object]:
    return {
        "question_id": "q",
        "prompt": "When?",
        "teacher": "a",
        "completion": "The answer is 05/01/2020.",
        "answer": "05/01/2020",
    } | more


def test_the_domain_is_found_or_named() -> None:
    (found,) = load_problems([row()])
    assert found.domain.name == "date" and found.domain is found.domain
    (named,) = load_problems([row(answer_type="text")])
    assert named.domain.name == "text"
    assert load_questions([row(answer_type=None)])[0].answer_type is None


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row(answer_type="dates")], "rows.jsonl:1: answer_type must be one of .*date.*'dates'"),
        ([row(answer_type="number", answer="none")], "rows.jsonl:1: gold: expected an answer of"),
        (
            [row(), row(teacher="b", answer_type="date")],
            "rows.jsonl:2: answer_type of question_id 'q' must be None as at .*rows.jsonl:1, "
            "got 'date'",
        ),
        ([row(), row(teacher="b", answer="05/02/2020")], "rows.jsonl:2: answer '05/02/2020'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, object]], words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match=words):
        load_problems(file)


def test_answers_of_one_problem_may_be_written_in_two_ways() -> None:
    (found,) = load_problems([row(), row(teacher="b", answer="May 1, 2020")])
    assert found.answer == "05/01/2020" and len(found.rationales) == 2
