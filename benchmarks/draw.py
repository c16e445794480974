"""Redraws plots and tables from benchmarks/results/*.csv: `python -m benchmarks.draw`.

Writes docs/results/<case>.png, docs/results/benchmarks.md, and the field `measured` of each claim
in bounds.json: the worst among machines. For each case, shape, dtype and machine the table shows
the last run. A claim is judged by the median over the runs of the newest commit.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks import run
from benchmarks.gate import BOUNDS, Bound, load_bounds
from benchmarks.harness import ROOT

OURS, OTHERS, INK, FAINT = "#0b6e99", "#b8bec4", "#222222", "#e3e6e8"
SHOWN = {"products": "products, whole buffers"}  # names of providers, where tables say more


@dataclass(frozen=True)
class Run:
    """The rows of one case at one shape in one process.

    Attributes:
        case, dtype, device, machine, commit, versions, date: as in the rows.
        shape: as --shape takes it.
        rows: provider -> its row of figures, as text.
    """

    case: str
    shape: str
    dtype: str
    device: str
    machine: str
    commit: str
    versions: str
    date: str
    rows: Mapping[str, Mapping[str, str]]

    def figure(self, provider: str, field: str) -> float:
        """Returns one figure; NaN if it was not measured."""
        text = self.rows[provider][field]
        return float(text) if text else math.nan

    @property
    def base(self) -> str:
        """The first provider, to which `ratio` refers."""
        return next(iter(self.rows))

    @property
    def day(self) -> str:
        """The date without the time."""
        return self.date[:10]

    @property
    def where(self) -> str:
        """Machine, commit and day."""
        return f"{self.machine}; commit {self.commit}, {self.day}"


def all_runs(folder: Path) -> list[Run]:
    """Reads all runs, cases in the order of run.CASES, the last run of a case last.

    Skips runs with a single provider, because they compare nothing.
    """
    shared = ("case", "shape", "dtype", "device", "machine", "commit", "versions", "date")
    runs: list[Run] = []
    for case in run.CASES:
        path = folder / f"{case}.csv"
        if not path.exists():
            continue
        groups: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                groups.setdefault(tuple(row[k] for k in shared), {})[row["provider"]] = row
        runs += [Run(*key, rows) for key, rows in groups.items() if len(rows) > 1]
    return runs


def kind(one: Run) -> tuple[str, ...]:
    """Returns what two runs must share to replace each other."""
    return one.case, one.shape, one.dtype, one.device, one.machine


def last_runs(runs: Sequence[Run], needs: Collection[str] = ()) -> list[Run]:
    """Returns the last run of each `kind` that has all providers in `needs`."""
    return list({kind(r): r for r in runs if set(needs) <= set(r.rows)}.values())


def largest(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> list[Run]:
    """Returns the largest group of runs with the same key; of equal groups the last one."""
    groups: dict[Hashable, list[Run]] = {}
    for one in runs:
        groups.setdefault(key(one), []).append(one)
    return max(reversed(groups.values()), key=len)


# --- tables -----------------------------------------------------------------------------------


def seconds_text(seconds: float) -> str:
    """Returns a time with three digits and a suitable unit."""
    if math.isnan(seconds):
        return "-"
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def memory_text(mb: float) -> str:
    """Returns a peak in MB."""
    return "-" if math.isnan(mb) else f"{mb:.1f} MB" if mb < 10 else f"{mb:,.0f} MB"


def run_table(one: Run, every: Sequence[Run]) -> str:
    """Returns a Markdown table of one run, with the command that repeats it.

    Args:
        one: the run.
        every: all runs. Providers that only earlier ones have get a line below the table.
    """
    lines = [
        f"**{one.shape}**, {one.dtype} ({one.where})",
        "",
        f"| provider | median | p20 to p80 | time / {one.base} | peak extra memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in one.rows:
        spread = " to ".join(seconds_text(one.figure(name, q)) for q in ("p20_s", "p80_s"))
        ratio = f"{one.figure(name, 'ratio'):.2f}"
        label = f"**{name}**" if name.startswith("compact") else SHOWN.get(name, name)
        lines.append(
            f"| {label} | {seconds_text(one.figure(name, 'median_s'))} | {spread} | {ratio} "
            f"| {memory_text(one.figure(name, 'peak_mb'))} |"
        )
    device = " --device cuda" if one.device == "cuda" else ""
    dtype = "" if one.dtype == "float32" else f" --dtype {one.dtype}"
    command = f"python -m benchmarks.run {one.case} --shape {one.shape}{device}{dtype}"
    earlier = {
        name: before
        for before in every
        if kind(before) == kind(one) and before.base == one.base
        for name in before.rows
        if name not in one.rows
    }
    for name, before in earlier.items():
        lines += [
            "",
            f"`{name}` did not take part. In its last run on this machine (commit {before.commit}, "
            f"{before.day}) it took {before.figure(name, 'ratio'):.2f} of the time of "
            f"`{before.base}`, and {memory_text(before.figure(name, 'peak_mb'))}.",
        ]
    return "\n".join([*lines, "", f"`{command}`"])


def scale_table(runs: Sequence[Run]) -> str:
    """Returns a Markdown table of all shapes of a case: medians, peaks and ratios to the first.

    Args:
        runs: runs of one machine, commit and day.
    """
    names = list(runs[0].rows)
    base = names[0]
    lines = [
        f"| shape | {base} | " + " | ".join(f"{n}: time | memory" for n in names[1:]) + " |",
        "|---" + "|--:" * (2 * len(names) - 1) + "|",
    ]
    for one in (r for r in runs if set(names) <= set(r.rows)):
        cells = [f"{seconds_text(one.figure(base, 'median_s'))}, "
                 f"{memory_text(one.figure(base, 'peak_mb'))}"]  # fmt: skip
        for name in names[1:]:
            for field in ("median_s", "peak_mb"):
                cells.append(f"{one.figure(name, field) / one.figure(base, field):.2f}")
        lines.append(f"| {one.shape} | {' | '.join(cells)} |")
    where = f"{runs[0].dtype} ({runs[0].where})"
    return "\n".join([*lines, "", where, "", "`python -m benchmarks.run scale`"])


def scale_tables(runs: Sequence[Run]) -> list[str]:
    """Returns a table for each machine, commit and day."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for one in runs:
        groups.setdefault((one.dtype, one.device, one.where), []).append(one)
    return [scale_table(group) for group in groups.values()]


def figures(bound: Bound, every: Sequence[Run]) -> dict[str, float]:
    """Returns machine -> the figure of a claim: the median of its newest commit, CPUs only."""
    about = (bound.case, bound.shape, "float32", "cpu")
    mine = [
        one
        for one in every
        if (one.case, one.shape, one.dtype, one.device) == about and bound.needs <= set(one.rows)
    ]
    newest = {one.machine: one.commit for one in mine}
    found: dict[str, list[float]] = {}
    for one in mine:
        value = bound.figure(one.rows.values())
        if one.commit == newest[one.machine] and not math.isnan(value):
            found.setdefault(one.machine, []).append(value)
    return {machine: float(f"{median(values):.3g}") for machine, values in found.items()}


def judged(bounds: Sequence[Bound], every: Sequence[Run]) -> list[Bound]:
    """Returns the claims, each with its worst figure among machines (None if there is none)."""
    return [
        dataclasses.replace(bound, measured=max(figures(bound, every).values(), default=None))
        for bound in bounds
    ]


def bounds_table(bounds: Sequence[Bound], every: Sequence[Run]) -> str:
    """Returns a Markdown table of the bounds, with a column of figures for each machine.

    A bound is met if every machine that measured it meets it.
    """
    measured = [figures(bound, every) for bound in bounds]
    machines = sorted({machine for found in measured for machine in found})
    lines = [
        " | ".join(["| claim", "at most", *machines, "|"]),
        "|---|--:|" + "--:|" * len(machines) + "---|",
    ]
    for bound, found in zip(bounds, measured, strict=True):
        over = [machine for machine in machines if found.get(machine, -math.inf) > bound.bound]
        shown = [f"{found[machine]:g}" if machine in found else "-" for machine in machines]
        verdict = "met" if found else "not measured"
        if over:
            verdict = f"**not met** on {'; '.join(over)}"
        lines.append(" | ".join([f"| {bound.claim}", f"{bound.bound:g}", *shown, f"{verdict} |"]))
    return "\n".join(lines)


def document(bounds: Sequence[Bound], every: Sequence[Run], pictures: Sequence[str]) -> str:
    """Returns docs/results/benchmarks.md.

    Args:
        bounds: the claims.
        every: all runs.
        pictures: names of the pictures that exist.
    """
    runs = last_runs(every)
    parts = [
        "# Benchmarks",
        "`python -m benchmarks.draw` writes this page from `benchmarks/results/*.csv`; do not "
        "edit it. All providers run in one process on the same inputs and take turns (A B C A B "
        "C ...), after a check of their outputs against a reference. Times are medians. Memory is "
        "the peak of a call minus what was in use before it.",
        "## Bounds and what was measured",
        "On each machine the newest commit counts, with the median of its runs. Met means: on "
        "every machine that measured it.",
        bounds_table(bounds, every),
    ]
    for case in run.CASES:
        mine = [one for one in runs if one.case == case]
        if mine:
            about = run.load_case(case)
            parts += [f"## {about.TITLE}", about.LEGEND]
            if f"{case}.png" in pictures:
                parts.append(f"![{about.TITLE}]({case}.png)")
            if case == "scale":
                parts += scale_tables(mine)
            else:
                parts += [run_table(one, every) for one in mine]
    if runs:
        parts.append(f"Versions of the last run: {max(runs, key=lambda r: r.date).versions}.")
    return "\n\n".join(parts) + "\n"


# --- plots ------------------------------------------------------------------------------------


def style(ax: Axes, title: str) -> None:
    """Removes parts of the axes that carry no information."""
    ax.set_title(title, loc="left", fontsize=9, color=INK)
    ax.spines[["top", "right", "left", "bottom"]].set_visible(False)
    ax.tick_params(length=0, labelsize=8, colors=INK)


def bars(ax: Axes, one: Run, field: str, title: str) -> None:
    """Draws one figure of every provider as horizontal bars, each with its value.

    If there are four or more times and the longest is over three times the next, its bar is cut, so
    that the others can be compared.
    """
    names = list(one.rows)
    values = [one.figure(name, field) for name in names]
    shown = [0.0 if math.isnan(v) else v for v in values]
    colours = [OURS if name.startswith("compact") else OTHERS for name in names]
    *_, second, longest = sorted([0.0, *shown])
    lone = field == "median_s" and len(names) > 3 and longest > 3 * second > 0
    end = 1.5 * second if lone else longest
    labels = [SHOWN.get(name, name) for name in names]
    ax.barh(labels, [min(v, end) for v in shown], color=colours, height=0.62)
    ax.invert_yaxis()
    ax.set_xticks([])
    text = seconds_text if field == "median_s" else memory_text
    right = end
    for i, value in enumerate(values):
        cut = shown[i] > end
        at = min(shown[i], end)
        if field == "median_s" and not cut:
            low, at = one.figure(names[i], "p20_s"), one.figure(names[i], "p80_s")
            ax.plot([low, at], [i, i], color=INK, linewidth=1)
        right = max(right, at)
        label = f" // {text(value)} (cut off)" if cut else f"  {text(value)}"
        ax.text(at, i, label, va="center", fontsize=8, color=INK)
    ax.set_xlim(0, max(right, 1e-9) * 1.3)
    style(ax, title)


def draw_bars(runs: Sequence[Run], path: Path) -> None:
    """Draws time and peak memory, one row per run; the title has the shared settings."""
    parts = [[*one.shape.split(","), one.dtype, one.machine] for one in runs]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    heights = [len(one.rows) + 1.8 for one in runs]
    figure, axes = plt.subplots(
        *(len(runs), 2),
        figsize=(9, 0.27 * sum(heights) + 0.7),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (left, right), one, own in zip(axes, runs, parts, strict=True):
        rest = ", ".join(part for part in own if part not in shared)
        bars(left, one, "median_s", f"{rest}\nmedian time" if rest else "median time")
        bars(right, one, "peak_mb", "peak extra memory")
        right.set_yticklabels([])
    title = f"{run.load_case(runs[0].case).TITLE}\n{', '.join(shared)}"
    figure.suptitle(title, fontsize=9, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def varied(runs: Sequence[Run]) -> dict[str, list[tuple[str, Run]]]:
    """Returns (value, run) for each size; the runs differ from the first run in this size only."""
    shapes = [dict(part.split("=") for part in one.shape.split(",")) for one in runs]
    found: dict[str, list[tuple[str, Run]]] = {}
    for key in (k for k, value in shapes[0].items() if value.isdecimal()):
        line = [
            (shape[key], one)
            for shape, one in zip(shapes, runs, strict=True)
            if all(shape[k] == shapes[0][k] for k in shape if k != key)
        ]
        if len(line) > 1:
            found[key] = sorted(line, key=lambda pair: int(pair[0]))
    return found


LINES = ("scale", "long")  # cases that are drawn over their sizes
SIZE_NAMES = {
    "L": "tokens of the tree L",
    "K": "teachers K",
    "Q": "tokens of the question Q",
    "T": "tokens of a rationale T",
    "V": "vocabulary V",
    "P": "questions in a batch P",
}


def draw_lines(runs: Sequence[Run], path: Path) -> None:
    """Draws time (top) and memory (bottom) over each size that varies.

    Only the machine with the most runs is drawn, because seconds of two machines make no line.
    """
    runs = largest(runs, lambda r: (r.machine, r.dtype, r.device))
    lines = varied(runs)
    if not lines:
        draw_bars(runs, path)
        return
    width = max(2.7 * len(lines), 5)
    figure, axes = plt.subplots(
        *(2, len(lines)),
        figsize=(width, 5.2),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    greys = ["#888888", "#b8bec4", "#c9a66b", "#7d6b91"]
    blues = [OURS, "#62b0d1", "#0a4a66", "#7a6fd0"]
    for column, (key, points) in enumerate(lines.items()):
        for row, field in enumerate(("median_s", "peak_mb")):
            ax = axes[row][column]
            ours, theirs = iter(blues * 3), iter(greys * 3)
            for name in points[0][1].rows:
                pairs = [
                    (float(v), one.figure(name, field)) for v, one in points if name in one.rows
                ]
                colour = next(ours if name.startswith("compact") else theirs)
                ax.plot(
                    *zip(*pairs, strict=True), marker="o", markersize=4, color=colour, label=name
                )
            sizes = [float(v) for v, _ in points]
            if sizes[-1] >= 16 * sizes[0]:
                ax.loglog()
                ax.minorticks_off()
            else:
                ax.set_ylim(bottom=0)
            ax.set_xticks(sizes, [f"{int(v):,}" for v in sizes])
            ax.grid(axis="y", color=FAINT)
            ax.set_axisbelow(True)
            style(ax, "seconds a step" if field == "median_s" else "peak extra memory, MB")
            if row:
                ax.set_xlabel(SIZE_NAMES.get(key, key), fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(4, int(width / 2.2)),
        frameon=False,
        fontsize=9,
    )
    figure.supxlabel(f"{runs[0].dtype}, {runs[0].machine}", fontsize=8, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 after one line of error."""
    parse = argparse.ArgumentParser("python -m benchmarks.draw", description=__doc__)
    parse.add_argument("--results", type=Path, default=run.RESULTS)
    parse.add_argument("--docs", type=Path, default=ROOT / "docs/results")
    parse.add_argument("--bounds", type=Path, default=BOUNDS, help="its `measured` is written")
    options = parse.parse_args(argv)
    try:
        every = all_runs(options.results)
        runs = last_runs(every)
        if not runs:
            raise ValueError(
                f"{options.results}: expected results of runs, got none; "
                "see python -m benchmarks.run --help"
            )
        bounds = judged(load_bounds(options.bounds), every)
        table = json.dumps([dataclasses.asdict(b) for b in bounds], indent=2)
        options.bounds.write_text(f"{table}\n")
        options.docs.mkdir(parents=True, exist_ok=True)
        pictures = []
        for case in run.CASES:
            mine = [one for one in runs if one.case == case]
            if mine:
                pictures.append(f"{case}.png")
                (draw_lines if case in LINES else draw_bars)(mine, options.docs / pictures[-1])
        (options.docs / "benchmarks.md").write_text(document(bounds, every, pictures))
    except (ValueError, OSError) as error:
        print(f"benchmarks.draw: error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.docs}/benchmarks.md, {', '.join(pictures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
