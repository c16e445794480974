"""Fails when a ratio leaves its committed bound: `python -m benchmarks.gate` (`make bench-gate`).

For each claim, bounds.json has the `bound` (the project's target), the figure last `measured` on
quiet machines, the worst of them (written by benchmarks.draw), and the `gate`, the limit that fails
the build. The gate is wider than the measured figure, because CI machines are noisy. Only ratios
between providers of one process and memory, which does not depend on speed, are checked. A ratio
fails if it exceeds its gate in every attempt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from benchmarks import run
from benchmarks.harness import ProviderFailed, WrongResult

BOUNDS = Path(__file__).parent / "bounds.json"


@dataclass(frozen=True)
class Bound:
    """One claim.

    Attributes:
        claim: the claim in words, for tables.
        case: a case of benchmarks.run.
        shape: the complete shape, as for --shape.
        provider: the provider that is measured.
        over: the provider whose figure is the divisor; None for "peak_mb" and "seconds".
        what: "time" (ratio of medians), "memory" (ratio of peaks), "peak_mb" (a peak in MB) or
            "seconds" (a median).
        bound: the project's target.
        measured: the worst among the figures of quiet machines, each the median of the newest
            commit there; None if there is none yet.
        gate: the limit that fails the build; None if the claim is not gated (too slow, data absent,
            or seconds, which depend on the machine).
        gate_shape: a smaller shape for the gate; None for `shape`.
    """

    claim: str
    case: str
    shape: str
    provider: str
    over: str | None
    what: str
    bound: float
    measured: float | None
    gate: float | None
    gate_shape: str | None

    def __post_init__(self) -> None:
        if self.what not in ("time", "memory", "peak_mb", "seconds"):
            raise ValueError(
                f"{self.claim}: what must be time, memory, peak_mb or seconds, got {self.what!r}"
            )
        if (self.over is None) != (self.what in ("peak_mb", "seconds")):
            raise ValueError(
                f"{self.claim}: over must name a provider if what is time or memory, else be null"
            )
        if self.what == "seconds" and self.gate is not None:
            raise ValueError(f"{self.claim}: seconds depend on the machine; gate must be null")

    @property
    def needs(self) -> set[str]:
        """The providers that must run."""
        return {self.provider} | ({self.over} if self.over else set())

    def figure(self, rows: Iterable[run.Row]) -> float:
        """Returns the figure of the claim from the rows of one run; NaN if it was not measured.

        Raises:
            ValueError: if a provider is missing from the rows.
        """
        by_name = {row["provider"]: row for row in rows}
        for name in self.needs - set(by_name):
            raise ValueError(f"{self.claim}: no figures of provider {name!r}")
        key = "median_s" if self.what in ("time", "seconds") else "peak_mb"
        figures = [by_name[name][key] for name in (self.provider, self.over) if name]
        if any(f in (None, "") for f in figures):
            return math.nan
        top, *bottom = map(float, figures)
        # Memory is exact to half a MB, so a provider without extra memory counts as 1 MB.
        return top / max(bottom[0], 1.0 if self.what == "memory" else 0.0) if bottom else top


def load_bounds(path: Path = BOUNDS) -> list[Bound]:
    """Reads the claims.

    Raises:
        ValueError: for an entry with missing or unknown fields.
    """
    names = {f.name for f in fields(Bound)}
    found = []
    for i, entry in enumerate(json.loads(path.read_text())):
        if set(entry) != names:
            raise ValueError(f"{path}: entry {i} must have the fields {sorted(names)}")
        found.append(Bound(**entry))
    return found


def judge(
    bounds: Sequence[Bound],
    measure: Callable[[str, str, list[str]], list[run.Row]],
    attempts: int = 3,
) -> dict[Bound, float]:
    """Measures the gated claims; repeats a measurement while a claim exceeds its gate.

    Args:
        bounds: claims; those without a gate are skipped.
        measure: (case, shape, providers) -> the rows of one run.
        attempts: greatest number of runs of one case and shape.

    Returns:
        The best figure of each gated bound over the attempts.
    """
    best: dict[Bound, float] = {}

    def where(bound: Bound) -> tuple[str, str]:
        return bound.case, bound.gate_shape or bound.shape

    gated = sorted((b for b in bounds if b.gate is not None), key=where)
    for (case, shape), group in itertools.groupby(gated, key=where):
        pending = list(group)
        for _ in range(attempts):
            rows = measure(case, shape, sorted(set().union(*(b.needs for b in pending))))
            for bound in pending:
                best[bound] = min(bound.figure(rows), best.get(bound, math.inf))
            pending = [b for b in pending if best[b] > b.gate]
            if not pending:
                break
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if every gate holds."""
    parse = argparse.ArgumentParser("python -m benchmarks.gate", description=__doc__)
    parse.add_argument(
        "--seconds", type=float, default=6.0, help="seconds of timed work per run (6)"
    )
    parse.add_argument(
        "--attempts", type=int, default=3, help="a ratio fails after this many runs (3)"
    )
    parse.add_argument("--bounds", type=Path, default=BOUNDS)
    options = parse.parse_args(argv)
    start = time.monotonic()

    def measure(case: str, shape: str, wanted: list[str]) -> list[run.Row]:
        sizes = run.parse_shape(shape, run.load_case(case).SHAPES[0])
        rows = run.run_case(
            case, sizes, device=torch.device("cpu"), wanted=wanted, seconds=options.seconds
        )
        run.print_rows(rows)
        return rows

    try:
        best = judge(load_bounds(options.bounds), measure, options.attempts)
    except (ValueError, OSError, ImportError, WrongResult, ProviderFailed) as error:
        print(f"benchmarks.gate: error: {error}", file=sys.stderr)
        return 1
    failed = False
    print(f"\n{'now':>8} {'gate':>8} {'measured':>8} {'bound':>8}")
    for bound, value in best.items():
        bad = value > bound.gate
        failed |= bad
        verdict = "FAILED" if bad else "not measured here" if math.isnan(value) else "ok"
        known = "-" if bound.measured is None else f"{bound.measured:.3g}"
        claim = bound.claim + (f" (here at {bound.gate_shape})" if bound.gate_shape else "")
        print(f"{value:8.3g} {bound.gate:8g} {known:>8} {bound.bound:8g}  {claim}: {verdict}")
    print(f"{time.monotonic() - start:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
