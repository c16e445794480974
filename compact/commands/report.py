"""`compact report`: writes one self-contained HTML page about a run."""

from __future__ import annotations

import argparse

from compact.files import check_output, write_whole
from compact.report.page import render
from compact.report.run import look_into, read_run

EPILOG = """example:
  compact report runs/svamp
  compact report runs/svamp --question_id svamp-00017 --out page.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact report`."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of compact compare")
    parser.add_argument("--out", metavar="FILE", help="page to write [RUN/report.html]")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--problems", type=int, metavar="N", help="how many problems to show [3]")
    shown.add_argument("--question_id", nargs="+", metavar="ID", help="problems to show")
    parser.add_argument("--data", metavar="FILE", help="rationales [those of the run]")


def run(args: argparse.Namespace) -> int:
    """Runs `compact report`; returns the exit status."""
    problems = 3 if args.problems is None else args.problems
    if problems < 0:
        raise ValueError(f"--problems must be at least 0, got {problems}")
    found = read_run(args.run)
    page_file = args.out if args.out is not None else found.folder / "report.html"
    out = check_output(page_file, kind="report")
    if args.problems and not found.scores:
        raise ValueError(f"--problems must be used with a run, and {args.run} has no score log")
    look_into(found, problems=problems, question_ids=args.question_id, data=args.data)
    page = render(found)
    write_whole(out, page, kind="report")
    for note in found.notes:
        print(note)
    print(f"{out} ({len(page) / 1024:.0f} KiB)")
    return 0
