"""`compact planted`: plants errors in rationales of some teachers, to test a weighting."""

from __future__ import annotations

import argparse
import json

from compact.data import load_problems
from compact.files import check_output, write_whole
from compact.lab.planted import PLANTS, mislead, pairs

KIND = "rationales with planted errors"
EPILOG = """example:
  compact planted rationales.jsonl --teachers gpt-4o gemini --kind operation --out spoilt.jsonl
  compact planted rationales.jsonl --teachers gpt-4o --kind operation --pairs --out pairs.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact planted`."""
    parser.add_argument("data", metavar="DATA", help="rationales, JSON lines")
    parser.add_argument(
        "--teachers", nargs="+", required=True, metavar="NAME", help="their rationales get errors"
    )
    parser.add_argument("--kind", choices=PLANTS, default="carried", help="kind of error [carried]")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random choices [0]"
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="write preference pairs, a right rationale and its copy with an error, at most one a "
        "problem: a test for compact compare and compact evaluate",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")


def run(args: argparse.Namespace) -> int:
    """Runs `compact planted`; returns the exit status."""
    out = check_output(args.out, args.data, kind=KIND)
    problems, names = load_problems(args.data), ", ".join(dict.fromkeys(args.teachers))
    given = (problems, args.teachers, args.kind, args.seed)
    if args.pairs:
        rows = pairs(*given)
        told = f"a pair for {len(rows):,} of {len(problems):,} problems, from {names}"
    else:
        rows, planted, theirs = mislead(*given)
        told = f"an error in {planted:,} of {theirs:,} rationales of {names}"
    write_whole(out, "".join(json.dumps(row) + "\n" for row in rows), kind=KIND)
    print(f"{out}: {told}")
    return 0
