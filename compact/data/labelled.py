"""Reads rationales that are known to be right or wrong, for measuring metrics.

Beside the fields of rationales a row may have `right` (true or false) and `steps`, a list of
{"text", "right"} with `right` true, false or null (not judged). Without `right` in any row, a
rationale is right if its stated answer is the gold one. Labels are never given to a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compact.data.problems import Problem, load_problems, text_of
from compact.data.rows import read_rows


@dataclass(frozen=True)
class Label:
    """What is known of a rationale.

    Attributes:
        right: whether it is right.
        states_gold: whether its stated answer is the gold one; None without a gold answer.
        steps: (text, right) of its steps in order; right is None where nobody judged. () if the
            data have none.
    """

    right: bool
    states_gold: bool | None
    steps: tuple[tuple[str, bool | None], ...] = ()


Labels = Mapping[tuple[str, str], Label]
"""(question_id, teacher) -> label."""


def load_labelled(
    source: str | Path | Sequence[Mapping[str, Any]],
) -> tuple[list[Problem], dict[tuple[str, str], Label]]:
    """Reads labelled rationales from a file, a data set or a sequence of rows.

    Raises:
        ValueError: as `load_problems`; or a label is not what the module's text says, is missing
            in some rows only, or has no gold answer to be found from.
        TypeError, OSError: as `load_problems`.
    """
    problems = load_problems(source)
    raw = {number: (where, fields) for where, number, fields in read_rows(source)}
    with_label = [where for where, row in raw.values() if row.get("right") is not None]
    if with_label and len(with_label) < len(raw):
        missing = next(where for where, row in raw.values() if row.get("right") is None)
        raise ValueError(
            f"{missing}: right is missing, but {with_label[0]} has it; expected it in every row "
            "or in none"
        )
    labels: dict[tuple[str, str], Label] = {}
    for problem in problems:
        for rationale in problem.rationales:
            where, row = raw[rationale.line]
            states = None
            if problem.answer is not None:
                stated = problem.domain.extract(text_of(rationale.completion))
                states = problem.domain.matches(stated, problem.answer)
            right = row.get("right") if with_label else states
            if right is None:
                raise ValueError(
                    f"{where}: expected the field right, or an answer that tells whether the "
                    "rationale is right"
                )
            if not isinstance(right, bool):
                raise TypeError(f"{where}: right must be true or false, got {right!r}")
            key = problem.question_id, rationale.teacher
            labels[key] = Label(right, states, _steps(row.get("steps"), where))
    return problems, labels


def _steps(found: Any, where: str) -> tuple[tuple[str, bool | None], ...]:
    if found is None:
        return ()
    if not isinstance(found, list):
        raise TypeError(f"{where}: steps must be a list, got {type(found).__name__}")
    steps = []
    for index, step in enumerate(found):
        ok = isinstance(step, dict) and isinstance(step.get("text"), str)
        if not ok or not isinstance(step.get("right"), bool | None):
            raise TypeError(
                f"{where}: steps[{index}] must have text and right (true, false or null), "
                f"got {str(step)[:60]}"
            )
        steps.append((step["text"], step.get("right")))
    return tuple(steps)
