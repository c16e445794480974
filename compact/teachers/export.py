"""Turns the answers in a store into rows of the trainer's data format, and describes them.

A row is one rationale: question_id, prompt, teacher, completion, answer. Further fields, which the
trainer ignores, say how it came about: `mark` (right, wrong or unread against the gold answer; null
without one), `stated` (the answer that was read), `count` (identical samples that it stands for),
`model`, and `reasoning`, where that is kept apart. With n > 1, sample k of a teacher is the teacher
`NAME#k`, because a teacher has one rationale for a problem.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from compact.answers import Judge, Verdict
from compact.teachers.collect import Item, Plans
from compact.teachers.prompts import find_template
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, Store
from compact.text.markdown import markdown_table

Row = dict[str, Any]
RIGHT, WRONG, UNREAD = "right", "wrong", "unread"


@dataclass
class Found:
    """What a teacher's part of the store gave.

    Attributes:
        teacher: who was asked.
        requests: requests of the plan.
        rows: rationales, in order of the questions.
        marks: of each sample that is in the rows: right, wrong, unread, or None without gold.
        merged: samples that equal an earlier one of their teacher and question.
        cut: answers that were cut at the limit of tokens, kept or not.
        empty: answers without text, or withheld by a filter; they are not in the rows.
        missing: requests without an answer.
        first, last: when the answers came, in seconds since 1970; 0 without answers.
    """

    teacher: Teacher
    requests: int
    rows: list[Row]
    marks: list[str | None]
    merged: int = 0
    cut: int = 0
    empty: int = 0
    missing: int = 0
    first: float = 0.0
    last: float = 0.0


def find_rows(store: Store, plans: Plans) -> list[Found]:
    """Reads and marks the answers that the store has for each teacher's requests.

    Raises:
        RuntimeError: a process that compares mathematics could not be started.
    """
    judge = Judge()
    try:
        return [_of_teacher(store, teacher, items, judge) for teacher, items in plans]
    finally:
        judge.close()


def rows_of(found: Sequence[Found]) -> list[Row]:
    """Returns the rows of all teachers, question by question."""
    by_question: dict[str, list[Row]] = {}
    for one in found:
        for row in one.rows:
            by_question.setdefault(row["question_id"], []).append(row)
    return [row for rows in by_question.values() for row in rows]


def _of_teacher(store: Store, teacher: Teacher, items: Sequence[Item], judge: Judge) -> Found:
    answers = store.answers([item.key for item in items])
    times = [answer.at for answer in answers.values()]
    found = Found(teacher, len(items), [], [], missing=len(items) - len(answers))
    found.first, found.last = min(times, default=0.0), max(times, default=0.0)
    kept: list[tuple[Item, Answer]] = []
    for item in items:
        answer = answers.get(item.key)
        if answer is None:
            continue
        found.cut += answer.finish == "length"
        if not answer.text.strip() or answer.finish == "content_filter":
            found.empty += 1
        elif answer.finish != "length" or teacher.keep_cut:
            kept.append((item, answer))
    first: dict[tuple[str, str], Row] = {}
    for (item, answer), (stated, mark) in zip(kept, _marks(kept, judge), strict=True):
        row = _row(teacher, item, answer) | {"stated": stated, "mark": mark, "count": 1}
        found.marks.append(mark)
        same = first.setdefault((item.problem.question_id, json.dumps(row["completion"])), row)
        if same is row:
            found.rows.append(row)
        else:
            same["count"] += 1
            found.merged += 1
    return found


def _row(teacher: Teacher, item: Item, answer: Answer) -> Row:
    problem, completion = item.problem, answer.text.strip()
    reasoning = answer.reasoning.strip()
    if reasoning and teacher.reasoning == "completion":
        completion = f"<think>\n{reasoning}\n</think>\n\n{completion}"
    name = teacher.name if teacher.n == 1 else f"{teacher.name}#{item.sample + 1}"
    row: Row = {
        "question_id": problem.question_id,
        "prompt": problem.prompt,
        "teacher": name,
        "completion": completion,
        "answer": problem.answer,
        "answer_type": problem.answer_type,
        "reasoning": reasoning if reasoning and teacher.reasoning == "apart" else None,
        "model": answer.model or teacher.model or teacher.local,
    }
    return {name: value for name, value in row.items() if value is not None}


def _marks(
    kept: Sequence[tuple[Item, Answer]], judge: Judge
) -> list[tuple[str | None, str | None]]:
    """Returns (answer that was read, mark) of each completion."""
    golds = {i: gold for i, (item, _) in enumerate(kept) if (gold := item.problem.answer)}
    verdicts = judge.judge(
        [(kept[i][0].problem.domain, kept[i][1].text, gold) for i, gold in golds.items()]
    )
    found: dict[int, Verdict] = dict(zip(golds, verdicts, strict=True))
    marks: list[tuple[str | None, str | None]] = []
    for i, (item, answer) in enumerate(kept):
        verdict = found.get(i)
        if verdict is None:
            marks.append((item.problem.domain.extract(answer.text), None))
        elif verdict.predicted is None or verdict.note:
            marks.append((verdict.predicted, UNREAD))
        else:
            marks.append((verdict.predicted, RIGHT if verdict.correct else WRONG))
    return marks


def data_card(found: Sequence[Found], questions: str, problems: int) -> str:
    """Returns a data card in Markdown: who wrote the rationales, when, how, and what to check.

    Args:
        found: the teachers and their rows.
        questions: name of the file of questions.
        problems: number of questions.
    """
    lines = [
        "# Data card",
        "",
        f"Rationales of {len(found)} teachers for {problems} questions of `{questions}`.",
        "Collected by `compact collect`.",
        "",
    ]
    rows: list[list[object]] = []
    for one in found:
        teacher, marks = one.teacher, one.marks
        cells: list[object] = [
            *(teacher.name, teacher.model or teacher.local),
            urlsplit(teacher.base_url).hostname if teacher.base_url else "in process",
            "-" if not one.last else " to ".join(dict.fromkeys(map(_day, (one.first, one.last)))),
            *(teacher.n, len(one.rows)),
            *(marks.count(mark) for mark in (RIGHT, WRONG, UNREAD)),
            *(one.cut, one.missing),
        ]
        rows.append(cells)
    lines += markdown_table(_COLUMNS, rows)
    lines += ["", "## How they were asked", ""]
    for one in found:
        teacher = one.teacher
        drawn = {
            name: value
            for name in ("temperature", "top_p", "max_tokens", "extra_body")
            if (value := getattr(teacher, name)) not in (None, {})
        }
        lines += [f"### {teacher.name}", "", f"Sampling: `{json.dumps(drawn)}`", ""]
        if teacher.system is not None:
            lines += ["System message:", "", _quoted(teacher.system), ""]
        lines += [f"Template `{_template_name(teacher)}`:", ""]
        lines += [_quoted(find_template(teacher.template)), ""]
    return "\n".join([*lines, _CHECK])


_COLUMNS = (
    *("teacher", "model", "endpoint", "dates (UTC)", "samples", "rationales"),
    *(RIGHT, WRONG, UNREAD, "cut", "missing"),
)
_CHECK = """## To check before you share the data or a student trained on it

- The licence of the questions.
- For each teacher, the licence of the model and the terms of the endpoint: some forbid training
  other models on the answers.
- Whether the questions or the answers hold personal data.
- Wrong and unread rationales are in the data, marked in the field `mark`.
"""


def _day(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc).strftime("%Y-%m-%d")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _template_name(teacher: Teacher) -> str:
    named = find_template(teacher.template) != teacher.template
    return teacher.template if named else "your own"
