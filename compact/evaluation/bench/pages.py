"""Writes what the bench measured: a page in Markdown, a table in CSV, a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compact.evaluation.bench.measures import Contestant, Estimate, localisation, measure
from compact.evaluation.discrimination import Table, draw
from compact.files import write_whole
from compact.graphs.drawing import picture_of

Rows = Sequence[Mapping[str, Any]]
_INTRODUCTION = """Area under the ROC curve within a question (AUC): how often a score ranks a right
rationale above a wrong one of the same question; a tie counts half, .50 is chance. In brackets: 95%
interval, bootstrap over questions."""


def write_pages(out: Path, sets: Mapping[str, Rows], about: str) -> str:
    """Writes bench.md, bench.csv and bench.png into a folder; returns the text of the first.

    Args:
        out: an existing folder.
        sets: name -> rows of a labelled data set.
        about: a line that says what was measured and how.
    """
    found = {name: measure(rows) for name, rows in sets.items()}
    places = {name: localisation(rows) for name, rows in sets.items()}
    page = _markdown(found, places, sets, about)
    write_whole(out / "bench.md", page, kind="bench")
    write_whole(out / "bench.csv", _csv(found, places), kind="bench")
    cells: Table = {name: dict.fromkeys(found, (math.nan, math.nan)) for name, _ in _order(found)}
    for data, contestants in found.items():
        for c in contestants:
            if c.name in cells:
                cells[c.name][data] = (c.auc.value, 0.5 * (c.auc.high - c.auc.low))
    figure = draw(cells, "right above wrong within a question", "AUC (0.5 is chance)")
    write_whole(out / "bench.png", picture_of(figure, "png", tidy=True), kind="bench")
    return page


def _markdown(
    found: Mapping[str, Sequence[Contestant]],
    places: Mapping[str, Mapping[str, Estimate]],
    sets: Mapping[str, Rows],
    about: str,
) -> str:
    lines = ["# Bench of metrics", "", about, "", _INTRODUCTION, "", "## Right above wrong", ""]
    names = _order(found)
    lines += [
        "| score | kind | " + " | ".join(found) + " |",
        "|---|---|" + "---|" * len(found),
    ]
    by_name = {data: {c.name: c for c in contestants} for data, contestants in found.items()}
    for name, kind in names:
        cells = [_cell(by_name[data][name].auc) if name in by_name[data] else "-" for data in found]
        lines.append(f"| `{name}` | {kind} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{data}: {_mixed(c)} of {len(sets[data])}" for data, c in found.items())
    lines += ["", f"Questions with right and wrong rationales: {counts}.", ""]
    lines += ["## Among the rationales that state the gold answer", ""]
    lines += ["| score | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, _ in names:
        estimates = [
            by_name[data][name].auc_gold if name in by_name[data] else None for data in found
        ]
        if any(e is not None and e.number for e in estimates):
            cells = [
                "-" if e is None else f"{_cell(e)}, {e.number} q" if e.number else "-"
                for e in estimates
            ]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", "## The first wrong step", ""]
    if any(places.values()):
        lines += [
            "How often a score is highest at the first wrong step.",
            "",
            "| score | " + " | ".join(d for d in found if places[d]) + " |",
            "|---|" + "---|" * sum(bool(p) for p in places.values()),
        ]
        for name in next(iter(p for p in places.values() if p)):
            cells = [_cell(p[name]) for p in places.values() if p]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    else:
        lines.append("No data set has labelled steps.")
    lines += ["", "## Length and teachers", ""]
    lines += [
        "Length: rank correlation with the number of tokens, within a question. Teachers: rank "
        "correlation of the order of the teachers with that by their share of right rationales. "
        "Stable: correlation of the order from so many questions with the order from all.",
        "",
        "| score | data | length | teachers | stable |",
        "|---|---|---|---|---|",
    ]
    for data, contestants in found.items():
        for c in contestants:
            stable = ", ".join(f"{n}: {_number(x)}" for n, x in c.stability.items())
            lines.append(
                f"| `{c.name}` | {data} | {_number(c.length)} | {_number(c.teachers)} | {stable} |"
            )
    return "\n".join(lines) + "\n"


def _order(found: Mapping[str, Sequence[Contestant]]) -> list[tuple[str, str]]:
    """Returns (name, kind), best mean AUC first."""
    values: dict[tuple[str, str], list[float]] = {}
    for contestants in found.values():
        for c in contestants:
            if c.auc.number:
                values.setdefault((c.name, c.kind), []).append(c.auc.value)
    return sorted(values, key=lambda key: -sum(values[key]) / len(values[key]))


def _mixed(contestants: Sequence[Contestant]) -> int:
    return max((c.auc.number for c in contestants), default=0)


def _cell(estimate: Estimate) -> str:
    if not estimate.number:
        return "-"
    low, high = _number(estimate.low), _number(estimate.high)
    return f"{_number(estimate.value)} [{low}, {high}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _csv(
    found: Mapping[str, Sequence[Contestant]], places: Mapping[str, Mapping[str, Estimate]]
) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("data", "score", "kind", "measure", "value", "low", "high", "count"))
    for data, contestants in found.items():
        for c in contestants:
            table.writerow((data, c.name, c.kind, "auc", *c.auc))
            table.writerow((data, c.name, c.kind, "auc_gold", *c.auc_gold))
            table.writerow((data, c.name, c.kind, "length", c.length, "", "", ""))
            table.writerow((data, c.name, c.kind, "teachers", c.teachers, "", "", ""))
            for size, value in c.stability.items():
                table.writerow((data, c.name, c.kind, f"stable_{size}", value, "", "", ""))
        for name, estimate in places[data].items():
            table.writerow((data, name, "step", "first_wrong_step", *estimate))
    return text.getvalue()
