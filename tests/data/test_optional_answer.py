"""Rows without a gold answer: what is read, in which domain, and what is refused."""

from __future__ import annotations

from itertools import permutations

import pytest

from compact import load_problems, load_questions
from compact.answers import find_domain


def row(teacher: str, text: str = "The answer is 5.", **more: object) -> dict[str, object]:
    return {
        "question_id": "q",
        "prompt": "How many?",
        "teacher": teacher,
        "completion": text,
    } | more


def test_answer_may_be_missing_or_null() -> None:
    (found,) = load_problems([row("a"), row("b", answer=None)])
    assert found.answer is None and found.domain.name == "number"
    (named,) = load_problems([row("a", answer_type="text")])
    assert named.domain.name == "text"
    with pytest.raises(ValueError, match=r"row 0: answer_type must be one of .*'dates'"):
        load_problems([row("a", answer_type="dates")])


@pytest.mark.parametrize("given", ["first", "second"])
def test_a_problem_has_it_in_all_rows_or_in_none(given: str) -> None:
    golds = ({"answer": "5"}, {}) if given == "first" else ({}, {"answer": "5"})
    has = "has no answer here, but has one" if given == "first" else "has an answer here, but"
    with pytest.raises(ValueError, match=f"row 1: question_id 'q' {has}.* at list row 0"):
        load_problems([row("a", **golds[0]), row("b", **golds[1])])


def test_test_questions_need_it() -> None:
    with pytest.raises(ValueError, match="row 0: field 'answer' is missing"):
        load_questions([row("a")])


@pytest.mark.parametrize(
    "prompt, texts, name",
    [
        ("Which? (A) red (B) blue", ["The answer is 5"], "choice"),
        ("When?", ["The answer is 05/01/2020.", "#### 7", "Answer: May 1, 2020"], "date"),
        ("Is it?", ["The answer is yes.", "So the answer is no.", "I think 7."], "yes_no"),
        ("How many?", ["Marco has 7. #### 7 apples", "The answer is $7.50"], "number"),
        ("Who?", ["The answer is the nephew.", "The answer is nephew.", "The answer is 3"], "text"),
        ("What?", ["The answer is $\\boxed{x^2 + 1}$"], "math"),
        ("Who or how many?", ["The answer is the nephew.", "The answer is 3"], "number"),  # a tie
        ("How many?", ["7", "maybe 8"], "general"),
    ],
)
def test_stated_answers_stand_in_for_the_gold_one(prompt: str, texts: list[str], name: str) -> None:
    for order in permutations(texts):
        assert find_domain(None, prompt, None, order).name == name


def test_a_named_domain_reads_the_prompt() -> None:
    choice = find_domain(None, "Which?\n(A) red\n(B) blue", "choice")
    assert choice.extract("The answer is blue.") == "B"
    day_first = find_domain(None, "When (DD/MM/YYYY)?", "date")
    assert day_first == find_domain("05/01/2020", "When (DD/MM/YYYY)?")
    assert find_domain(None, "How many?", "number").extract("so 7") == "7"
