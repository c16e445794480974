"""Runs a case: `python -m benchmarks.run head --json h.json`. How to write one: harness.py."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from benchmarks import harness
from benchmarks.harness import Args, Provider, ProviderFailed, Skipped, Timing, WrongResult

CASES = ("head", "step", "host", "long", "attention", "graph", "kl", "scale", "ops")
PARTS = ("TITLE", "LEGEND", "SHAPES", "providers")  # of a case; harness.py explains them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
RESULTS = Path(__file__).parent / "results"
FIELDS = (
    *("case", "provider", "shape", "dtype", "device", "median_s", "p20_s", "p80_s", "peak_mb"),
    *("ratio", "rounds", "error", "machine", "versions", "commit", "date"),
)
Row = dict[str, Any]


def parse_shape(text: str, defaults: dict[str, int | str]) -> dict[str, int | str]:
    """Reads "M=1024,V=32000" and completes it from the case's defaults.

    Raises:
        ValueError: for a key that the case does not have, or for text instead of a number.
    """
    shape = dict(defaults)
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            known = ",".join(f"{k}={v}" for k, v in defaults.items())
            raise ValueError(f"--shape: expected parts of {known!r}, got {part!r}")
        if isinstance(defaults[key], int):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--shape: {key} must be a whole number from 1, got {value!r}")
            shape[key] = int(value)
        else:
            shape[key] = value
    return shape


def load_case(name: str) -> ModuleType:
    """Imports `benchmarks.<name>`.

    Raises:
        ValueError: if there is no such case; the message lists the cases. Or if the module lacks a
            name, which would otherwise show only when the results are drawn.
    """
    if name not in CASES:
        raise ValueError(f"case must be one of {', '.join(CASES)}; got {name!r}")
    case = importlib.import_module(f"benchmarks.{name}")
    if missing := [part for part in PARTS if not hasattr(case, part)]:
        raise ValueError(f"benchmarks/{name}.py must define {', '.join(missing)}")
    return case


def clear_line() -> None:
    """Removes a progress bar, so that something else can be printed."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def choose(found: dict[str, Provider | Skipped], wanted: Sequence[str]) -> dict[str, Provider]:
    """Returns the providers to run, the case's first one first; prints those that cannot run here.

    Raises:
        ValueError: if a wanted provider is unknown or cannot run, or if no provider can run.
    """
    for name in wanted:
        if name not in found:
            raise ValueError(f"--provider: expected one of {', '.join(found)}; got {name!r}")
        if isinstance(provider := found[name], Skipped):
            raise ValueError(f"--provider: {name} cannot run here: {provider.reason}")
    chosen = {}
    for name, provider in found.items():
        if isinstance(provider, Skipped):
            clear_line()
            print(f"  {name}: skipped, {provider.reason}", file=sys.stderr)
        elif provider.slow and not wanted:
            clear_line()
            print(f"  {name}: slow, runs only with --provider {name}", file=sys.stderr)
        elif not wanted or name in wanted:
            chosen[name] = provider
    if not chosen:
        reasons = {p.reason for p in found.values() if isinstance(p, Skipped)}
        raise ValueError(f"no provider of this case can run here: {'; '.join(sorted(reasons))}")
    return chosen


def run_case(
    case: str,
    shape: dict[str, int | str],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    wanted: Sequence[str] = (),
    seconds: float = 25.0,
    only_check: bool = False,
    report: Callable[[str, float], None] = harness.silent,
) -> list[Row]:
    """Measures one case at one shape.

    Args:
        case: one of CASES.
        shape: the complete shape.
        device: device of the inputs and of the calls.
        dtype: dtype of the inputs.
        wanted: names of providers; all if empty.
        seconds: approximate seconds of timed work.
        only_check: only compare the outputs with the reference.
        report: as in `harness.compare`.

    Returns:
        A row per provider. `ratio` is its median over that of the first provider that ran.

    Raises:
        ValueError: for an unknown case or provider, or a dtype that the case does not take.
        WrongResult: if an output is wrong. ProviderFailed: if a provider raises.
    """
    module = load_case(case)
    known = getattr(module, "DTYPES", tuple(DTYPES))
    if (name := str(dtype).removeprefix("torch.")) not in known:
        raise ValueError(f"--dtype: case {case} takes {', '.join(known)}; got {name}")
    report("making inputs", math.nan)
    found = module.providers(Args(shape, device, dtype, only=frozenset(wanted) or None))
    timings = harness.compare(
        choose(found, wanted), device, seconds=seconds, only_check=only_check, report=report
    )
    shared = {
        "case": case,
        "shape": shape,
        "dtype": name,
        "device": device.type,
        "machine": harness.machine(device),
        "versions": harness.versions(),
        "commit": harness.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    base = next(iter(timings.values()))
    return [as_row(name, timing, base, shared) for name, timing in timings.items()]


def as_row(name: str, timing: Timing, base: Timing, shared: Row) -> Row:
    """Returns one row of results in the order of FIELDS; a figure not measured is None."""
    row: Row = {**shared, "provider": name, "error": float(f"{timing.error:.2e}")}
    row["rounds"] = len(timing.seconds)
    row["peak_mb"] = None if math.isnan(timing.peak_mb) else round(timing.peak_mb, 1)
    for key in ("median_s", "p20_s", "p80_s", "ratio"):
        row[key] = None
    if timing.seconds:
        row["median_s"] = float(f"{timing.median_s:.5g}")
        row["p20_s"] = float(f"{timing.quantile(20):.5g}")
        row["p80_s"] = float(f"{timing.quantile(80):.5g}")
        row["ratio"] = round(timing.median_s / base.median_s, 4)
    return {key: row[key] for key in FIELDS}


def shape_text(shape: dict[str, int | str]) -> str:
    """Returns a shape in the format of --shape: "M=1024,H=576"."""
    return ",".join(f"{k}={v}" for k, v in shape.items())


def append_csv(rows: Sequence[Row], folder: Path) -> Path:
    """Appends rows to `<folder>/<case>.csv`, with a header if the file is new; returns its path.

    Raises:
        ValueError: if the file has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0]['case']}.csv"
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != FIELDS:
            raise ValueError(f"{path}:1: expected the columns {','.join(FIELDS)}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            packages = " ".join(f"{k}={v}" for k, v in row["versions"].items())
            writer.writerow({**row, "shape": shape_text(row["shape"]), "versions": packages})
    return path


def print_rows(rows: Sequence[Row]) -> None:
    """Prints one shape's results as a table."""
    first = rows[0]
    print(f"{first['case']} {shape_text(first['shape'])} {first['dtype']} on {first['machine']}")
    width = max(len(row["provider"]) for row in rows)
    print(f"  {'provider':<{width}}  median s     p20     p80  peak MB  ratio    error")
    for row in rows:
        times = [row[k] for k in ("median_s", "p20_s", "p80_s")]
        cells = [f"{t:7.4f}" if t is not None else "      -" for t in times]
        peak = f"{row['peak_mb']:7.1f}" if row["peak_mb"] is not None else "      -"
        ratio = f"{row['ratio']:5.2f}" if row["ratio"] is not None else "    -"
        error = f"{row['error']:.1e}"
        print(f"  {row['provider']:<{width}}  {' '.join(cells)}   {peak}  {ratio}  {error}")


class Bar:
    """A progress bar with the time left; prints only on a terminal.

    Args:
        shapes: number of shapes; the estimate assumes that all take the same time.
    """

    def __init__(self, shapes: int) -> None:
        self.shapes, self.index = shapes, 0
        self.start = self.shape_start = time.monotonic()

    def next_shape(self) -> None:
        """Starts the next shape."""
        self.index += 1
        self.shape_start = time.monotonic()

    def left(self, here: float) -> float:
        """Returns the seconds left in total, given those of this shape (NaN: not known yet)."""
        now = time.monotonic()
        whole = now - self.shape_start + here
        if self.index > 1:
            before = (self.shape_start - self.start) / (self.index - 1)
            if math.isnan(here):
                here = max(before - (now - self.shape_start), 0.0)
            whole = before
        return here + (self.shapes - self.index) * whole

    def __call__(self, what: str, here: float) -> None:
        """Shows the current work; `here` is the second argument of `report` in `compare`."""
        if not sys.stderr.isatty():
            return
        left, used = self.left(here), time.monotonic() - self.start
        if math.isnan(left):
            text = f"{' ' * 20}  time left: not known yet"
        else:
            done = used / max(used + left, 1e-9)
            minutes, seconds = divmod(round(left), 60)
            text = f"{'#' * int(20 * done):<20}  {minutes}:{seconds:02d} left"
        print(f"\r\x1b[K[{text[:20]}]{text[20:]}, shape {self.index} of {self.shapes}: {what}",
              end="", file=sys.stderr, flush=True)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ValueError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message} (see --help)")


def parser() -> Parser:
    """Returns the command line."""
    parse = Parser("python -m benchmarks.run", description=__doc__)
    parse.add_argument("case", nargs="?", metavar="CASE", help=f"one of {', '.join(CASES)}")
    parse.add_argument(
        "--list", action="store_true", help="list cases and shapes; with CASE, its providers"
    )
    parse.add_argument("--names", action="store_true", help="list only the names of the cases")
    parse.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parse.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parse.add_argument(
        "--provider", nargs="+", default=[], metavar="NAME", help="only these (default: all)"
    )
    parse.add_argument(
        "--shape", action="append", default=[], metavar="M=1024,V=32000", help="sizes; repeatable"
    )
    parse.add_argument("--seconds", type=float, default=25.0, help="timed work per shape (25)")
    parse.add_argument("--refcheck", action="store_true", help="only check the outputs")
    parse.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as JSON")
    parse.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="append CSV rows to files in DIR",
    )
    return parse


def list_cases() -> None:
    """Prints every case in a line, and its shapes."""
    for name in CASES:
        case = load_case(name)
        print(f"{name:<6} {(case.__doc__ or '').splitlines()[0]}")
        for shape in case.SHAPES:
            print(f"{'':<6} --shape {shape_text(shape)}")


def list_providers(case: str, shape: dict[str, int | str], device: torch.device) -> None:
    """Prints the providers of a case at one shape, and why one cannot run."""
    for name, provider in load_case(case).providers(Args(shape, device)).items():
        if isinstance(provider, Skipped):
            print(f"{name}: cannot run here, {provider.reason}")
        else:
            print(f"{name}: runs only when named" if provider.slow else name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 1 after one line of error."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        options = parser().parse_args(argv)
        if options.names:
            print(*CASES)
            return 0
        if options.case is None:
            if not options.list:
                raise ValueError(f"CASE must be one of {', '.join(CASES)} (see --list and --help)")
            list_cases()
            return 0
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: this torch sees no CUDA device")
        if options.json and not options.json.resolve().parent.is_dir():
            raise ValueError(f"--json: no such folder: {options.json.resolve().parent}")
        device = torch.device(options.device)
        case = load_case(options.case)
        shapes = [parse_shape(text, case.SHAPES[0]) for text in options.shape] or case.SHAPES
        if options.list:
            list_providers(options.case, shapes[0], device)
            return 0
        rows: list[Row] = []
        bar = Bar(len(shapes))
        for shape in shapes:
            bar.next_shape()
            new = run_case(
                options.case,
                shape,
                device=device,
                dtype=DTYPES[options.dtype],
                wanted=options.provider,
                seconds=options.seconds,
                only_check=options.refcheck,
                report=bar,
            )
            clear_line()
            print_rows(new)
            if not options.refcheck:
                append_csv(new, options.results)
            rows += new
            if options.json:  # after every shape: a run that is cut short leaves what it has
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    except (ValueError, OSError, ImportError, WrongResult, ProviderFailed) as error:
        clear_line()
        if os.environ.get("COMPACT_TRACEBACK") == "1":
            raise
        print(f"benchmarks.run: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        clear_line()
        print("benchmarks.run: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
