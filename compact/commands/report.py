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
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of compact compare")
    parser.add_argument("--out", metavar="FILE", help="page to write [RUN/report.html]")
    parser.add_argument(
        "--problems", type=int, default=3, metavar="N", help="how many problems to show [3]"
    )
    parser.add_argument("--question_id", nargs="+", metavar="ID", help="problems to show")
    parser.add_argument("--data", metavar="FILE", help="rationales [those of the run]")


def run(args: argparse.Namespace) -> int:
    """Runs `compact report`; returns the exit status."""
    if args.problems < 0:
        raise ValueError(f"--problems must be at least 0, got {args.problems}")
    found = read_run(args.run)
    page_file = args.out if args.out is not None else found.folder / "report.html"
    out = check_output(page_file, kind="report")
    look_into(found, problems=args.problems, question_ids=args.question_id, data=args.data)
    page = render(found)
    write_whole(out, page, kind="report")
    for note in found.notes:
        print(note)
    print(f"{out} ({len(page) / 1024:.0f} KiB)")
    return 0
