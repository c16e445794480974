"""`compact strategies`: lists the distillation methods besides weighting, and their needs."""

from __future__ import annotations

import argparse

from compact.commands.metrics import print_table
from compact.strategies import STRATEGIES

EPILOG = """example:
  compact strategies
  compact strategies --import my_module
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`compact strategies` takes no options of its own."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Prints the registry of strategies."""
    rows = [
        (name, ", ".join(strategy.needs) or "nothing", (strategy.__doc__ or "").partition("\n")[0])
        for name, strategy in STRATEGIES.items()
    ]
    print_table("strategies", rows)
    return 0
