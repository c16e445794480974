"""Writes what the bench measured: a page in Markdown, a table in CSV, a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compact.evaluation.bench.measures import Contestant, Estimate, localisation, measure
from compact.files import check_output, write_whole
from compact.graphs.drawing import picture_of
from compact.text.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
_KIND = "bench"
_INTRODUCTION = """Area under the ROC curve within a question (AUC): how often a score ranks a right
rationale above a wrong one of the same question; a tie counts half, .50 is chance. In brackets: 95%
interval, bootstrap over questions. `judged` and `agreement` use the gold answer where there is one;
"without gold" they do not."""


def check_pages(out: Path, inputs: Sequence[str | Path]) -> None:
    """Checks, before the work that leads to them, that `write_pages` may write its files.

    Raises:
        ValueError, OSError: as `check_output`.
    """
    for suffix in ("md", "csv", "png"):
        check_output(out / f"bench.{suffix}", *inputs, kind=_KIND)


def write_pages(out: Path, sets: Mapping[str, Rows], about: str) -> str:
    """Writes bench.md, bench.csv and bench.png into a folder; returns the text of the first.

    Args:
        out: an existing folder.
        sets: name -> rows of a labelled data set.
        about: a line that says what was measured and how.

    Raises:
        ValueError: no question has both right and wrong rationales.
    """
    found = {name: measure(rows) for name, rows in sets.items()}
    if not _order(found):
        raise ValueError(
            f"{', '.join(found)}: expected a question with right and wrong rationales, got none"
        )
    places = {name: localisation(rows) for name, rows in sets.items()}
    page = _markdown(found, places, sets, about)
    write_whole(out / "bench.md", page, kind=_KIND)
    write_whole(out / "bench.csv", _csv(found, places), kind=_KIND)
    figure = draw(
        {
            f"{name} ({kind})": [_value(found[data], name, kind) for data in found]
            for name, kind in _order(found)
        },
        list(found),
    )
    write_whole(out / "bench.png", picture_of(figure, "png", tidy=True), kind=_KIND)
    return page


def _markdown(
    found: Mapping[str, Sequence[Contestant]],
    places: Mapping[str, Mapping[str, Estimate]],
    sets: Mapping[str, Rows],
    about: str,
) -> str:
    lines = ["# Bench of metrics", "", about, "", _INTRODUCTION, "", "## Right above wrong", ""]
    names = _order(found)
    by_name = {
        data: {(c.name, c.kind): c for c in contestants} for data, contestants in found.items()
    }
    table = []
    for name, kind in names:
        known = [by_name[data].get((name, kind)) for data in found]
        cells = ["-" if c is None else _cell(c.auc) for c in known]
        table.append([f"`{name}`", kind, *cells])
    lines += markdown_table(["score", "kind", *found], table)
    counts = ", ".join(f"{data}: {_mixed(c)} of {len(sets[data])}" for data, c in found.items())
    lines += ["", f"Questions with right and wrong rationales: {counts}.", ""]
    lines += ["## Among the rationales that state the gold answer", ""]
    table = []
    for name, kind in names:
        known = [by_name[data].get((name, kind)) for data in found]
        if any(c is not None and c.auc_gold.number for c in known):
            cells = [
                f"{_cell(c.auc_gold)}, {c.auc_gold.number} q" if c and c.auc_gold.number else "-"
                for c in known
            ]
            table.append([f"`{name}`", *cells])
    lines += markdown_table(["score", *found], table)
    lines += ["", "## Share of the weight on right rationales", ""]
    table = []
    for name, kind in names:
        known = [by_name[data].get((name, kind)) for data in found]
        if kind != "metric":
            cells = ["-" if c is None else _cell(c.mass) for c in known]
            table.append([f"`{name}`", kind, *cells])
    lines += markdown_table(["weights", "kind", *found], table)
    lines += ["", "Questions that have a right rationale count."]
    lines += ["", "## The first wrong step", ""]
    with_steps = {data: places[data] for data in found if places[data]}
    if with_steps:
        lines += ["How often a score is highest at the first wrong step.", ""]
        lines += markdown_table(
            ["score", *with_steps],
            [
                [name, *(_cell(place[name]) for place in with_steps.values())]
                for name in next(iter(with_steps.values()))
            ],
        )
    else:
        lines.append("No data set has labelled steps.")
    lines += ["", "## Length and teachers", ""]
    lines += [
        "Length: rank correlation with the number of tokens, within a question. Teachers: rank "
        "correlation of the order of the teachers with that by their share of right rationales. "
        "Stable: correlation of the order from so many questions with the order from all.",
        "",
    ]
    table = []
    for data, contestants in found.items():
        for c in contestants:
            stable = ", ".join(f"{n}: {_number(x)}" for n, x in c.stability.items())
            numbers = [_number(c.length), _number(c.teachers)]
            table.append([f"`{c.name}`", data, *numbers, stable])
    lines += markdown_table(["score", "data", "length", "teachers", "stable"], table)
    return "\n".join(lines) + "\n"


def _order(found: Mapping[str, Sequence[Contestant]]) -> list[tuple[str, str]]:
    """Returns (name, kind), best mean AUC first."""
    values: dict[tuple[str, str], list[float]] = {}
    for contestants in found.values():
        for c in contestants:
            if c.auc.number:
                values.setdefault((c.name, c.kind), []).append(c.auc.value)
    return sorted(values, key=lambda key: -sum(values[key]) / len(values[key]))


def _value(contestants: Sequence[Contestant], name: str, kind: str) -> float:
    """Returns the AUC of a score; nan if it was not measured."""
    return next((c.auc.value for c in contestants if (c.name, c.kind) == (name, kind)), math.nan)


def draw(cells: Mapping[str, Sequence[float]], columns: Sequence[str]) -> Figure:
    """Draws a table of AUC: one row per score, one column per data set, coloured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 + 0.85 * len(columns), 1.8 + 0.3 * len(cells)), dpi=130)
    axes = figure.subplots()
    image = axes.imshow(list(cells.values()), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    for row, line in enumerate(cells.values()):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_title("right above wrong within a question", fontsize=9)
    figure.colorbar(image, ax=axes, label="AUC (0.5 is chance)", fraction=0.04)
    return figure


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
            if c.mass.number:
                table.writerow((data, c.name, c.kind, "mass", *c.mass))
            table.writerow((data, c.name, c.kind, "length", c.length, "", "", ""))
            table.writerow((data, c.name, c.kind, "teachers", c.teachers, "", "", ""))
            for size, value in c.stability.items():
                table.writerow((data, c.name, c.kind, f"stable_{size}", value, "", "", ""))
        for name, estimate in places[data].items():
            table.writerow((data, name, "step", "first_wrong_step", *estimate))
    return text.getvalue()
