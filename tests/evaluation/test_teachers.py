"""The page about teachers, from the rows of `compact score`."""

from __future__ import annotations

from typing import Any

from compact.evaluation.teachers import about, reasons, teachers_page


def row(question: str, teacher: str, weight: float, *findings: dict[str, Any]) -> dict[str, Any]:
    steps = [{"text": "x", "gain": None}] * 2
    basis = {"question_id": question, "teacher": teacher, "weight": weight, "basis": "gold"}
    return {**basis, "findings": list(findings), "steps": steps}


WRONG = {"kind": "answer", "step": None, "text": "states 5, the gold answer is 4"}
FALSE = {"kind": "arithmetic", "step": 1, "text": "2 + 2 = 5 does not hold"}
ROWS = [
    row("q1", "good", 1.0),
    row("q1", "b|ad<x>", 0.0, WRONG, FALSE),
    row("q2", "good", 1.0),
    row("q2", "b|ad<x>", 0.0, WRONG),
]


def test_problems_that_are_skipped_for_wrong_arithmetic_are_told() -> None:
    rows = [
        row("q1", "a", 0.0, FALSE) | {"validity": 1e-6},
        row("q1", "b", 0.0, FALSE) | {"validity": 1e-6},
        row("q2", "a", 0.5) | {"validity": 1.0},
        row("q2", "b", 0.5) | {"validity": 0.0},
    ]
    sentence = (
        "1 of 2 problems are skipped, because every rationale with the likeliest answer holds an "
        "equation that is wrong"
    )
    assert sentence in about(rows) and f"- {sentence}." in teachers_page(rows)
    for each in rows:
        each["validity"] = None  # of a policy
    assert sentence not in about(rows)


def test_reasons_are_sentences() -> None:
    assert reasons(ROWS[1]) == [
        "states 5, the gold answer is 4",
        "step 2: 2 + 2 = 5 does not hold",
    ]


def test_the_page_has_a_row_a_teacher_and_escapes_names() -> None:
    page = teachers_page(ROWS)
    assert "| good | 2 | 2.00 | 2 | 0.00 | 0.00 |" in page
    assert "| b\\|ad&lt;x> | 2 | 0.00 | 2 | 1.00 | 0.50 |" in page
    assert page.index("| good |") < page.index("| b\\|ad")
    assert "q1: weight 0.00: states 5, the gold answer is 4; step 2: 2 + 2 = 5" in page
    assert about(ROWS)[0].startswith("2 of 2 problems with a gold answer have rationales that")
