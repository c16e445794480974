"""Labelled rationales: labels from the data or from gold answers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compact.data.labelled import load_labelled


def write(path: Path, *rows: dict[str, Any]) -> Path:
    first = {"question_id": "q", "prompt": "2 + 2?", "teacher": "t", "answer": "4"}
    text = [json.dumps({**first, "completion": "The answer is 4.", **row}) for row in rows]
    path.write_text("\n".join(text) + "\n")
    return path


def test_labels_of_the_data(tmp_path: Path) -> None:
    steps = [{"text": "2 + 2 = 5", "right": False}, {"text": "So 4", "right": None}]
    file = write(tmp_path / "x.jsonl", {"right": False, "steps": steps})
    problems, labels = load_labelled(file)
    label = labels["q", "t"]
    assert len(problems) == 1
    assert not label.right and label.states_gold
    assert label.steps == (("2 + 2 = 5", False), ("So 4", None))


def test_without_labels_the_gold_answer_decides(tmp_path: Path) -> None:
    rows = {"teacher": "a", "right": None}, {"teacher": "b", "completion": "The answer is 5."}
    _, labels = load_labelled(write(tmp_path / "x.jsonl", *rows))
    assert [label.right for label in labels.values()] == [True, False]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"right": True}, {"teacher": "b"}],
            "x.jsonl:2: right is missing, but .*x.jsonl:1 has it",
        ),
        ([{"right": "yes"}], "x.jsonl:1: right must be true or false, got 'yes'"),
        ([{"right": True, "steps": "a"}], "x.jsonl:1: steps must be a list, got str"),
        ([{"right": True, "steps": [{"text": 1}]}], r"x.jsonl:1: steps\[0\] must have text and"),
        ([{"right": True, "steps": [{"text": "a", "right": 1}]}], r"steps\[0\] must have text"),
        ([{"answer": None}], "x.jsonl:1: expected the field right, or an answer that tells"),
    ],
)
def test_what_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        load_labelled(write(tmp_path / "x.jsonl", *rows))
