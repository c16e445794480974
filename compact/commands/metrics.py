"""`compact metrics`: lists metrics, presets, policies and answer domains."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from compact.answers import domain_names, get_domain
from compact.metrics import METRICS, Metric
from compact.weighting import POLICIES, PRESETS, Preset, weigher_names

EPILOG = """example:
  compact metrics
  compact metrics --import my_module
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`compact metrics` takes no options of its own."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Prints the registries of metrics, presets, policies and answer domains."""
    names = [name for name in weigher_names() if name not in PRESETS]
    print_table("metrics", [(n, m.axis, metric_needs(m), meaning(m)) for n, m in METRICS.items()])
    print_table("presets", [(name, preset_metrics(preset)) for name, preset in PRESETS.items()])
    print_table(
        "policies",
        [(n, first_line(f)) for n, f in zip(names, POLICIES.values(), strict=True)],
    )
    domains = [(name, first_line(get_domain(name))) for name in domain_names()]
    print_table("answer domains, in the order in which they are tried", domains)
    return 0


def metric_needs(metric: Metric) -> str:
    """Returns what a metric costs in addition to the pass."""
    if metric.needs_leaves:
        return "answer leaves"
    if metric.needs_options:
        return "option leaves"
    return "padded rows" if metric.needs_padded else "free"


def meaning(metric: Metric) -> str:
    """Returns the first docstring line: of the file for a built-in metric, else of the function."""
    module = metric.score.__module__
    built_in = module.startswith("compact.metrics.")
    return first_line(sys.modules[module] if built_in else metric.score)


def preset_metrics(preset: Preset) -> str:
    """Returns the metrics of a preset and their factors."""
    axes = (preset.adaptability, preset.consensus, preset.difficulty)
    used = [f"{b:g} {n}" for n, b in zip(axes, preset.beta, strict=True) if n != "none" and b]
    return f"{', '.join(used)}; tau {preset.tau:g}"


def first_line(entry: object) -> str:
    """Returns the first line of an entry's docstring."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def print_table(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Prints rows of text in columns under a title."""
    print(title)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  " + "  ".join(cells).rstrip())
    if not rows:
        print("  none is built in; docs/extending.md shows how to add one")
