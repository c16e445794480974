"""`compact discrimination`: measures which scores separate right rationales from wrong ones."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from compact.evaluation.discrimination import (
    Table,
    as_markdown,
    draw,
    svamp_study,
    weight_study,
    zoo_study,
)
from compact.files import check_output, write_json, write_whole
from compact.graphs.drawing import picture_of
from compact.lab.zoo_student import CACHE

EPILOG = """example:
  compact discrimination zoo --out docs/results/discrimination-zoo
  compact discrimination weights --out docs/results/zoo-weights
  compact discrimination svamp --data DIR/svamp/train.jsonl --model MODEL --out runs/svamp-auc
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact discrimination`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("zoo", "weights", "svamp"))
    parser.add_argument("--out", required=True, help="path of the results, without suffix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="[0 1]")
    parser.add_argument(
        "--problems", type=int, default=60, metavar="N", help="problems per seed [60]"
    )
    parser.add_argument("--data", metavar="FILE", help="svamp: rationales, JSON lines")
    parser.add_argument("--model", help="svamp: folder, Hugging Face name or .gguf file")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"zoo, weights: folder of students [{CACHE}]"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact discrimination`: writes OUT.md, OUT.json, OUT.png; returns the exit status."""
    if args.what == "svamp" and (args.data is None or args.model is None):
        raise ValueError("--data and --model must be given for svamp")
    if args.problems < 1:
        raise ValueError(f"--problems must be at least 1, got {args.problems}")
    makers: dict[str, Callable[[], Table]] = {
        "zoo": lambda: zoo_study(args.seeds, args.problems, args.cache),
        "weights": lambda: weight_study(args.seeds, args.problems, args.cache),
        "svamp": lambda: svamp_study(Path(args.data), args.model, args.seeds, args.problems),
    }
    out = Path(args.out)
    kind = "results of discrimination"
    inputs = [args.data] if args.data else []
    page, numbers, picture = (
        check_output(out.with_suffix(suffix), *inputs, kind=kind)
        for suffix in (".md", ".json", ".png")
    )
    table = makers[args.what]()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, as_markdown(table), kind=kind)
    settings = {"what": args.what, "seeds": args.seeds, "problems": args.problems}
    write_json(numbers, {**settings, "table": table}, kind=kind)
    title = f"{args.what}: right above wrong within a problem, seeds {args.seeds}"
    measure = "AUC (0.5 is chance)"
    if args.what == "weights":
        title, measure = f"weight on right rationales, seeds {args.seeds}", "share of the weight"
    write_whole(picture, picture_of(draw(table, title, measure), "png", tidy=True), kind=kind)
    print(as_markdown(table))
    return 0
