"""`compact strategies`: lists the methods besides weighting, what they need and their options."""

from __future__ import annotations

import argparse
import inspect
import json

from compact.commands.metrics import first_line, print_table
from compact.strategies import STRATEGIES, Strategy

EPILOG = """example:
  compact strategies
  compact strategies --import my_module
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`compact strategies` takes no options of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints the registry of strategies."""
    rows = [
        (name, ", ".join(strategy.needs) or "nothing", first_line(strategy))
        for name, strategy in STRATEGIES.items()
    ]
    print_table("strategies: needs, what they do", rows)
    print_table(
        "strategy_options, with defaults",
        [(name, options_of(strategy)) for name, strategy in STRATEGIES.items()],
    )
    return 0


def options_of(strategy: type[Strategy]) -> str:
    """Returns the arguments of a strategy's constructor, as in a recipe."""
    return ", ".join(
        name if given.default is given.empty else f"{name}: {json.dumps(given.default)}"
        for name, given in inspect.signature(strategy).parameters.items()
    )
