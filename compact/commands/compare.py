"""`compact compare`: trains with several weightings, at equal tokens, over seeds."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compact.commands.recipe import read_comparison
from compact.evaluation.arm_tables import as_markdown
from compact.evaluation.arms import DEFAULT_ARMS, Arm, parse_arm
from compact.evaluation.compare import compare, file_task, with_retained, zoo_task
from compact.lab.zoo import RIGHT
from compact.lab.zoo_student import CACHE, STAGES
from compact.options import check_given

SEEDS = (0, 1, 2)
OF_FILE = ("config", "test", "development", "model", "limit", "max_new_tokens")
ZOO: dict[str, Any] = {
    "problems": 240,
    "questions": 200,
    "epochs": 5.0,
    "stage": "middle",
    "cache": CACHE,
}
"""The options of a zoo and their defaults."""
EPILOG = """example:
  compact compare zoo-b --arms uniform answer-vote robust oracle --seeds 0 1 2 3 4 --out runs/zoo-b
  compact compare train.jsonl --config recipe.yaml --test test.jsonl \\
      --arms single:gpt-4o uniform robust,tau=0.5 --out runs/arms
  compact compare --config study.yaml --out runs/study   # with data, tests, arms and seeds in it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact compare`."""
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="rationales; or zoo-a, zoo-b: generated teachers, some wrong [data of the recipe]",
    )
    arms = " ".join(DEFAULT_ARMS)
    parser.add_argument(
        "--arms",
        nargs="+",
        help=f"presets or policies, with settings and a strategy after commas [{arms}]",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="every arm is trained once with each seed [0 1 2]",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of runs and tables")
    parser.add_argument("--tokens", type=int, metavar="N", help="completion tokens of each run")
    parser.add_argument(
        "--retained",
        metavar="FILE",
        help="texts; shows what each arm makes the student forget",
    )
    files = parser.add_argument_group("for a file")
    files.add_argument(
        "--config",
        metavar="RECIPE",
        help="recipe with student and settings; tests, arms, seeds and others may stand in it too",
    )
    files.add_argument(
        "--test",
        nargs="+",
        metavar="FILE",
        help="questions or preference pairs, JSON lines; the first file gives the accuracy",
    )
    files.add_argument(
        "--development",
        type=int,
        metavar="N",
        help="problems held out to choose among the arms single:TEACHER [0]",
    )
    files.add_argument("--model", help="student; replaces the recipe's")
    files.add_argument("--limit", type=int, metavar="N", help="most questions or pairs of a test")
    files.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="most tokens of an answer [256]"
    )
    group = parser.add_argument_group("for a zoo")
    group.add_argument("--problems", type=int, metavar="N", help="problems to train on [240]")
    group.add_argument("--questions", type=int, metavar="N", help="questions of the test [200]")
    group.add_argument("--epochs", type=float, metavar="N", help="passes over the problems [5]")
    group.add_argument(
        "--stage", choices=list(STAGES), help="how much the student has learned [middle]"
    )
    group.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"where students of a zoo are kept [{CACHE}]"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact compare`; returns the exit status."""
    given = ("tokens", "limit", "max_new_tokens", "problems", "questions", "epochs")
    check_given(args, *given, above=0)
    of_zoo = args.data in ("zoo-a", "zoo-b")
    for name in OF_FILE if of_zoo else ZOO:
        if getattr(args, name) is not None:
            where = "a file" if of_zoo else "zoo-a or zoo-b"
            raise ValueError(f"--{name} must be used with {where}, got DATA {args.data}")
    if of_zoo:
        arms, seeds, retained = _arms(args.arms, RIGHT), args.seeds, args.retained
        tokens = args.tokens
        task = zoo_task(
            args.data[-1],
            **{name: getattr(args, name) or default for name, default in ZOO.items()},
        )
    else:
        if args.config is None:
            raise ValueError("--config must be given when DATA is a file")
        recipe, config, asked = read_comparison(args.config)
        data, tests = args.data or recipe.data, args.test or asked.tests
        for name, value in (("DATA", data), ("--test", tests)):
            if value is None:
                raise ValueError(f"{name} must be given, there or in {args.config}")
        assert data is not None and tests is not None
        arms, seeds = _arms(args.arms or asked.arms), args.seeds or asked.seeds
        tokens = args.tokens or asked.tokens
        retained = args.retained or asked.retained
        held = asked.development if args.development is None else args.development
        task = file_task(
            data,
            tests,
            Path(args.config),
            recipe,
            config,
            model=args.model,
            limit=args.limit,
            development=held,
            max_new_tokens=args.max_new_tokens or asked.max_new_tokens,
        )
    if retained is not None:
        task = with_retained(task, retained)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    print(as_markdown(compare(task, arms, list(dict.fromkeys(seeds or SEEDS)), out, tokens)))
    print((out / "paired.md").read_text(encoding="utf-8"))
    print(f"tables, pictures and runs: {out}")
    return 0


def _arms(texts: Sequence[str] | None, right_teachers: Collection[str] = ()) -> list[Arm]:
    return [parse_arm(text, right_teachers) for text in dict.fromkeys(texts or DEFAULT_ARMS)]
