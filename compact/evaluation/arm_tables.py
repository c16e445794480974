"""Summary, tables and picture of `compact.evaluation.compare`: one row per arm."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compact.evaluation.paired import effect, shares
from compact.text.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRIFT = {
    "base_perplexity": ("perplexity before", ".2f"),
    "student_perplexity": ("perplexity after", ".2f"),
    "kl": ("KL to base", ".4f"),
}
"""Measures of what a student forgot on retained texts -> title of the column, format."""
COSTS = {"seconds": ("seconds with tests", ",.0f"), "peak_mb": ("peak MB", ",.0f"), **DRIFT}
"""The same of time, memory and forgetting."""


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Means and intervals (`effect`) of each arm over its seeds, in the order of `results`.

    Where all seeds have one value, they say nothing about others: the ends are then None.

    If there is an arm `uniform`, the others have a `gain`: their accuracy minus that of `uniform`,
    seed by seed.
    """
    base = {r["seed"]: r["accuracy"] for r in results.get("uniform", ())}
    arms = []
    for name, runs in results.items():
        values = [r["accuracy"] for r in runs]
        arm = {
            "name": name,
            "seeds": [r["seed"] for r in runs],
            "values": values,
            **_over_seeds(values, "mean", "ci"),
            **_over_seeds([r["right_weight"] for r in runs], "right_weight", "right_weight"),
            "weights": {
                t: statistics.fmean(r["weights"].get(t, 0.0) for r in runs)
                for t in dict.fromkeys(t for r in runs for t in r["weights"])
            },
            "tokens": round(statistics.fmean(r["tokens"] for r in runs)),
            "steps": round(statistics.fmean(r["steps"] for r in runs)),
            "seconds": statistics.fmean(r["seconds"] for r in runs),
            **_mean_costs(runs),
        }
        if base and name != "uniform":
            gains = [r["accuracy"] - base[r["seed"]] for r in runs]
            arm |= _over_seeds(gains, "gain", "gain", least=-1.0)
        arms.append(arm)
    return arms


def _over_seeds(
    values: Sequence[float], mean: str, ends: str, least: float = 0.0
) -> dict[str, float | None]:
    """Returns the mean and the ends of its interval under the keys MEAN, ENDS_low and ENDS_high."""
    found = effect(values)
    known = max(values) - min(values) > 1e-9  # gains of equal accuracies differ by rounding
    low, high = shares(found, least) if known else (None, None)
    return {mean: found.mean, f"{ends}_low": low, f"{ends}_high": high}


def _mean_costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of what every run has of peak_mb, and of KL and perplexity on retained texts."""
    found: dict[str, list[float | None]] = {"peak_mb": [r.get("peak_mb") for r in runs]}
    for name in DRIFT:
        found[name] = [_of_text(r).get(name) for r in runs]
    known = {name: [v for v in values if v is not None] for name, values in found.items()}
    return {n: statistics.fmean(v) for n, v in known.items() if len(v) == len(runs)}


def _of_text(run: Mapping[str, Any]) -> dict[str, float | None]:
    """What a run measured on retained texts; empty without them."""
    found: dict[str, float | None] = run.get("drift", {}).get("text", {})
    return found


def as_markdown(arms: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table."""
    teachers = sorted({t for arm in arms for t in arm["weights"]})
    head = ["arm", "accuracy", "over uniform", "weight on right", *teachers, "tokens", "steps"]
    costs = {name: form for name, form in COSTS.items() if any(name in arm for arm in arms)}
    head += [title for title, _ in costs.values()]
    rows = []
    for arm in arms:
        gain = _cell(arm["gain"], arm["gain_low"], arm["gain_high"], "+") if "gain" in arm else "-"
        cells = [
            arm["name"],
            _cell(arm["mean"], arm["ci_low"], arm["ci_high"]),
            gain,
            f"{arm['right_weight']:.2f}",
            *(f"{arm['weights'][t]:.2f}" if t in arm["weights"] else "-" for t in teachers),
            f"{arm['tokens']:,}",
            str(arm["steps"]),
            *(format(arm[name], form) if name in arm else "-" for name, (_, form) in costs.items()),
        ]
        rows.append(cells)
    return "\n".join(markdown_table(head, rows)) + "\n"


def _cell(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    interval = "" if low is None or high is None else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{mean:{sign}.3f}{interval}"


def as_csv(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The results as CSV, one row per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["arm", "seed", "accuracy", "right_weight", "tokens", "steps", "seconds", "peak_mb"]
    writer.writerow([*head, *DRIFT])
    for runs in results.values():
        for r in runs:
            numbers = [f"{r['accuracy']:.4f}", f"{r['right_weight']:.4f}", r["tokens"], r["steps"]]
            of_text = _of_text(r)
            costs = [r.get("peak_mb"), *(of_text.get(name) for name in DRIFT)]
            cells = [f"{r['seconds']:.1f}", *("" if c is None else f"{c:.6g}" for c in costs)]
            writer.writerow([r["arm"], r["seed"], *numbers, *cells])
    return text.getvalue()


def draw(arms: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws a panel of accuracy and one of weight on right rationales, one row per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.36 * len(arms)), dpi=130)
    panels = figure.subplots(1, 2, sharey=True)
    rows = list(range(len(arms)))[::-1]
    for axes, key, low, high, label in (
        (panels[0], "mean", "ci_low", "ci_high", "accuracy"),
        (
            panels[1],
            "right_weight",
            "right_weight_low",
            "right_weight_high",
            "weight on right rationales",
        ),
    ):
        values = [arm[key] for arm in arms]
        ends = [
            [v if a[end] is None else a[end] for end in (low, high)]
            for v, a in zip(values, arms, strict=True)
        ]
        spans = [[abs(v - pair[i]) for v, pair in zip(values, ends, strict=True)] for i in (0, 1)]
        axes.errorbar(values, rows, xerr=spans, fmt="none", ecolor="#7a8794", capsize=3)
        axes.scatter(values, rows, color="#1b6ca8", zorder=3)
        for value, row in zip(values, rows, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (value, row),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.6, len(arms) - 0.3)
        axes.set_xlabel(f"{label} (mean, 95% interval)", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(rows, [arm["name"] for arm in arms], fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
