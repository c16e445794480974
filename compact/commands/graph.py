"""`compact graph`: draws the consensus graph of a problem."""

from __future__ import annotations

import argparse
from pathlib import Path

from compact.files import check_output
from compact.graphs.drawing import draw_graph
from compact.graphs.step_graphs import load_graph

EPILOG = """example:
  compact graph graphs/svamp-00017.json --out svamp-00017.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact graph`."""
    parser.add_argument("graph", metavar="FILE", help="file saved by `compact score --graphs`")
    parser.add_argument(
        "--out", required=True, metavar="PICTURE", help="picture to write: .png, .svg or .pdf"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact graph`; returns the exit status."""
    out = check_output(args.out, args.graph, kind="picture of a graph")
    draw_graph(load_graph(Path(args.graph)), out)
    print(out)
    return 0
