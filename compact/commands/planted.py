"""`compact planted`: plants errors in rationales of some teachers, to test a weighting."""

from __future__ import annotations

import argparse
import json

from compact.data import load_problems
from compact.files import check_output, write_whole
from compact.lab.planted import PLANTS, mislead

EPILOG = """example:
  compact planted rationales.jsonl --teachers gpt-4o gemini --kind operation --out spoilt.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact planted`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("data", metavar="DATA", help="rationales, JSON lines")
    parser.add_argument(
        "--teachers", nargs="+", required=True, metavar="NAME", help="their rationales get errors"
    )
    parser.add_argument("--kind", choices=PLANTS, default="carried", help="kind of error [carried]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")


def run(args: argparse.Namespace) -> int:
    """Runs `compact planted`; returns the exit status."""
    out = check_output(args.out, args.data, kind="rationales with planted errors")
    rows, planted, theirs = mislead(load_problems(args.data), args.teachers, args.kind, args.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(out, text, kind="rationales with planted errors")
    names = ", ".join(dict.fromkeys(args.teachers))
    print(f"{out}: an error in {planted:,} of {theirs:,} rationales of {names}")
    return 0
