"""`compact compare`: trains with several weightings, at equal tokens, over seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from compact.commands.recipe import read_settings
from compact.evaluation.compare import (
    DEFAULT_ARMS,
    as_markdown,
    compare,
    file_task,
    parse_arm,
    zoo_task,
)
from compact.lab.zoo import RIGHT
from compact.lab.zoo_student import CACHE, STAGES

EPILOG = """example:
  compact compare zoo-b --arms uniform answer-vote robust oracle --seeds 0 1 2 3 4 --out runs/zoo-b
  compact compare train.jsonl --config recipes/svamp.yaml --test test.jsonl \\
      --arms single:gpt-4o uniform robust,tau=0.5 --out runs/svamp-arms
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact compare`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("data", metavar="DATA", help="rationales, JSON lines; or zoo-a, zoo-b")
    arms = " ".join(DEFAULT_ARMS)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(DEFAULT_ARMS),
        help=f"presets or policies, with settings and a strategy after commas [{arms}]",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of runs and tables")
    parser.add_argument("--tokens", type=int, metavar="N", help="completion tokens of each run")
    files = parser.add_argument_group("for a file")
    files.add_argument("--config", metavar="RECIPE", help="recipe with student and settings")
    files.add_argument("--test", metavar="FILE", help="test questions, JSON lines")
    files.add_argument("--model", help="student; replaces the recipe's")
    files.add_argument("--limit", type=int, metavar="N", help="most test questions")
    group = parser.add_argument_group("for a zoo")
    group.add_argument("--problems", type=int, default=240, metavar="N", help="[240]")
    group.add_argument("--questions", type=int, default=200, metavar="N", help="[200]")
    group.add_argument("--epochs", type=float, default=5.0, metavar="N", help="[5]")
    group.add_argument("--stage", choices=list(STAGES), default="middle", help="[middle]")
    group.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help=f"[{CACHE}]")


def run(args: argparse.Namespace) -> int:
    """Runs `compact compare`; returns the exit status."""
    for name in ("tokens", "limit", "problems", "questions", "epochs"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be greater than 0, got {value}")
    of_zoo = args.data in ("zoo-a", "zoo-b")
    arms = [parse_arm(text, RIGHT if of_zoo else ()) for text in dict.fromkeys(args.arms)]
    seeds = list(dict.fromkeys(args.seeds))
    if of_zoo:
        task = zoo_task(
            args.data[-1],
            problems=args.problems,
            questions=args.questions,
            epochs=args.epochs,
            stage=args.stage,
            cache=args.cache,
        )
    else:
        for name in ("config", "test"):
            if getattr(args, name) is None:
                raise ValueError(f"--{name} must be given when DATA is a file")
        recipe, config = read_settings(args.config, [])
        task = file_task(
            args.data,
            args.test,
            Path(args.config),
            recipe,
            config,
            model=args.model,
            limit=args.limit,
            arms=arms,
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(as_markdown(compare(task, arms, seeds, out, args.tokens)))
    print(f"table, picture and runs: {out}")
    return 0
