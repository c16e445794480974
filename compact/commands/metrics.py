"""`compact metrics`: lists the registries; with data, measures which score finds what is right."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from compact.answers import domain_names, get_domain
from compact.evaluation.bench.run import bench
from compact.metrics import METRICS, Metric
from compact.registry import require
from compact.weighting import POLICIES, PRESETS, TOKEN_WEIGHTS, Preset, weigher_names

EPILOG = """example:
  compact metrics
  compact metrics --import my_module
  compact metrics choices.jsonl --out runs/texts
  compact metrics choices.jsonl dates.jsonl --model MODEL --out runs/bench
  compact metrics zoo-a zoo-b zoo-c --model zoo-late --out runs/zoo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact metrics`."""
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="rationales with a field right, or with gold answers, JSON lines; zoo-a, zoo-b, "
        "zoo-c: generated teachers, of which it is known who is right; none: list names",
    )
    parser.add_argument(
        "--model",
        help="folder (also of a run), Hugging Face name, .gguf file; zoo-early, zoo-middle, "
        "zoo-late: trained here; none: scores of the texts",
    )
    parser.add_argument("--out", metavar="FOLDER", help="bench.md, .csv, .png and rows per file")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="metrics, presets, policies [all]"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N questions of each file")
    parser.add_argument(
        "--part",
        metavar="k/N",
        help="only part k of N of the questions, drawn by their ids [1/1]",
    )
    parser.add_argument("--max_length", type=int, metavar="N", help="tokens [1536]")


def run(args: argparse.Namespace) -> int:
    """Runs `compact metrics`; returns the exit status."""
    if not args.data:
        _refuse(args, ("model", "out", "only", "limit", "part", "max_length"), "DATA, got no file")
        return list_registries()
    if args.out is None:
        raise ValueError("--out must be given with DATA")
    if args.model is None:
        _refuse(args, ("only", "max_length"), "--model")
    require("matplotlib", "report", "compact metrics DATA draws pictures")
    out = Path(args.out)
    page = bench(
        args.data,
        args.model,
        out,
        only=args.only,
        limit=args.limit,
        part=args.part or "1/1",
        max_length=1536 if args.max_length is None else args.max_length,
    )
    print(page)
    print(f"-> {out / 'bench.md'}, bench.csv, bench.png and rows of every question")
    return 0


def _refuse(args: argparse.Namespace, names: Sequence[str], needed: str) -> None:
    """Raises ValueError for the first of these options that was given: it would do nothing."""
    for name in names:
        if getattr(args, name) not in (None, []):
            raise ValueError(f"--{name} must be used with {needed}")


def list_registries() -> int:
    """Prints the registries of metrics, presets, policies, token weights and answer domains."""
    names = [name for name in weigher_names() if name not in PRESETS]
    rows = [
        (n, m.axis, m.direction, metric_needs(m), meaning(m), m.aggregation)
        for n, m in METRICS.items()
    ]
    print_table("metrics: axis, better scores, needs, meaning, aggregation", rows)
    print_table("presets", [(name, preset_metrics(preset)) for name, preset in PRESETS.items()])
    print_table(
        "policies",
        [(n, first_line(f)) for n, f in zip(names, POLICIES.values(), strict=True)],
    )
    print_table("token weights", [(name, first_line(w)) for name, w in TOKEN_WEIGHTS.items()])
    domains = [(name, first_line(get_domain(name))) for name in domain_names()]
    print_table("answer domains, in the order in which they are tried", domains)
    return 0


def metric_needs(metric: Metric) -> str:
    """Returns what a metric needs or uses besides the pass: "free" if nothing."""
    needs = metric.needs
    gold = ["gold answers"] if needs.gold else ["gold if given"] if needs.judgements else []
    named = [*metric.costs, *gold, *needs.statistics]
    return ", ".join(named) or "free"


def meaning(metric: Metric) -> str:
    """Returns what a metric means: the first line of a docstring.

    It is the docstring of the file if a built-in metric is alone in it, else that of its function.
    The line ends before ": [R]", where some go on with the shape and unit of the scores.
    """
    module = metric.score.__module__
    alone = sum(m.score.__module__ == module for m in METRICS.values()) == 1
    built_in = module.startswith("compact.metrics.")
    line = first_line(sys.modules[module] if built_in and alone else metric.score)
    words, notation, _ = line.partition(": [R]")
    return f"{words}." if notation else line


def preset_metrics(preset: Preset) -> str:
    """Returns the metrics of a preset and their factors."""
    axes = (preset.adaptability, preset.consensus, preset.difficulty)
    used = [f"{b:g} {n}" for n, b in zip(axes, preset.beta, strict=True) if n != "none" and b]
    times = "" if preset.validity == "none" else f"{preset.validity} x "
    return f"{times}({', '.join(used)}; tau {preset.tau:g})"


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
