"""One page about the teachers of a data set, from the rows of `compact score`."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from compact.text.markdown import escaped, markdown_table
from compact.validity import Finding
from compact.validity.summary import describe

Rows = Sequence[Mapping[str, Any]]
_EXAMPLES = 3
_KINDS = {
    "answer": "another answer",
    "vote": "outvoted",
    "unread": "no answer read",
    "arithmetic": "wrong equation",
    "numbers": "number from nowhere",
    "copy": "copy of another",
}


def teachers_page(rows: Rows) -> str:
    """Returns a Markdown page: a row per teacher, and examples of what speaks against each.

    Args:
        rows: rows of `compact score`.
    """
    sizes = Counter(row["question_id"] for row in rows)
    teachers: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        teachers[row["teacher"]].append(row)

    def relative(row: Mapping[str, Any]) -> float:
        return float(row["weight"] * sizes[row["question_id"]])

    ordered = sorted(teachers, key=lambda t: -statistics.fmean(map(relative, teachers[t])))
    used = [kind for kind in _KINDS if any(kind in _kinds(row) for row in rows)]
    lines = ["# Teachers", "", *(f"- {sentence}." for sentence in about(rows)), ""]
    lines += [
        "Weight x K: 1 is the even share. The other columns: share of the teacher's rationales.",
        "",
    ]
    table = []
    for teacher in ordered:
        mine = teachers[teacher]
        weight = statistics.fmean(map(relative, mine))
        steps = statistics.median(len(row["steps"]) for row in mine)
        shares = [sum(kind in _kinds(row) for row in mine) / len(mine) for kind in used]
        cells = [str(len(mine)), f"{weight:.2f}", f"{steps:g}", *(f"{s:.2f}" for s in shares)]
        table.append([teacher, *cells])
    head = ["teacher", "rationales", "weight x K", "steps", *(_KINDS[kind] for kind in used)]
    lines += markdown_table(head, table)
    for teacher in ordered:
        found = [row for row in teachers[teacher] if row["findings"]]
        found.sort(key=relative)
        if found:
            lines += ["", f"**{escaped(teacher)}**", ""]
        for row in found[:_EXAMPLES]:
            words = "; ".join(reasons(row))
            lines.append(
                f"- {escaped(row['question_id'])}: weight {row['weight']:.2f}: {escaped(words)}"
            )
    return "\n".join(lines) + "\n"


class _Judged(NamedTuple):
    basis: str
    findings: tuple[Finding, ...]
    validity: float | None


def about(rows: Rows) -> list[str]:
    """Returns sentences about what the weights of the rows rest on."""
    problems: dict[str, list[_Judged]] = defaultdict(list)
    for row in rows:
        findings = tuple(Finding(**finding) for finding in row["findings"])
        judged = _Judged(row["basis"], findings, row.get("validity"))
        problems[row["question_id"]].append(judged)
    weighed = any(row.get("validity") is not None for row in rows)
    return describe(list(problems.values()), weighed=weighed)


def reasons(row: Mapping[str, Any]) -> list[str]:
    """Returns what speaks against a rationale, in words: "step 3: 4 + 14 = 20 does not hold"."""
    return [
        finding["text"]
        if finding["step"] is None
        else f"step {finding['step'] + 1}: {finding['text']}"
        for finding in row["findings"]
    ]


def _kinds(row: Mapping[str, Any]) -> set[str]:
    return {finding["kind"] for finding in row["findings"]}
