"""`compact score`: scores and weighs rationales without training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compact.data import load_problems, of_teacher
from compact.evaluation.score import parse_metrics, score_problems
from compact.files import check_output, content_of, content_of_student, write_whole
from compact.passes.encode import LEAF_BUDGET
from compact.resumable import remove_rows
from compact.student import Student, load_model
from compact.weighting import DEFAULT_PRESET, PresetWeigher, check_gold, make_weigher

EPILOG = """example:
  compact score rationales.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --out scores.jsonl
  compact score rationales.jsonl --model STUDENT --metric consensus=answer --out scores.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact score`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("data", metavar="DATA", help="rationales, JSON lines")
    parser.add_argument(
        "--model", required=True, help="folder (also of a run), Hugging Face name or .gguf file"
    )
    parser.add_argument(
        "--preset", default=DEFAULT_PRESET, help=f"preset or policy [{DEFAULT_PRESET}]"
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="AXIS=NAME",
        help="metric that replaces the preset's for an axis; may be repeated",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSON lines, one row per rationale"
    )
    parser.add_argument(
        "--graphs", metavar="FOLDER", help="save each problem's consensus graph (see compact graph)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--max_length", type=int, default=2560, metavar="N", help="tokens [2560]")
    parser.add_argument(
        "--leaf_budget",
        type=float,
        default=LEAF_BUDGET,
        metavar="X",
        help=f"most tokens of answer leaves, as a share of a row's tokens [{LEAF_BUDGET}]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact score`; returns the exit status."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if not args.leaf_budget > 0:
        raise ValueError(f"--leaf_budget must be above 0, got {args.leaf_budget}")
    overrides = parse_metrics(args.metric)
    weigher = make_weigher(args.preset, **overrides)
    problems = load_problems(args.data)[: args.limit]
    if weigher.teacher is not None:
        of_teacher(weigher.teacher, problems)  # raises if the teacher has no rationales
    check_gold(weigher, problems)
    out = check_output(args.out, args.data, args.model, kind="scores")
    out.parent.mkdir(parents=True, exist_ok=True)
    graphs = Path(args.graphs) if args.graphs else None
    if graphs:
        graphs.mkdir(parents=True, exist_ok=True)
    model, processing_class = load_model(args.model)
    settings = {
        "data": content_of(args.data),
        "model": args.model,
        "weights": content_of_student(args.model),
        "preset": args.preset,
        "metrics": overrides,
        "max_length": args.max_length,
        "leaf_budget": args.leaf_budget,
        "graphs": args.graphs,
    }
    partial = out.with_name(f"{out.name}.partial")
    rows = score_problems(
        Student.of(model, processing_class),
        processing_class,
        problems,
        weigher,
        max_length=args.max_length,
        leaf_budget=args.leaf_budget,
        partial=partial,
        settings=settings,
        graphs=graphs,
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(out, text, kind="scores")
    remove_rows(partial)
    print(f"{len(rows)} rationales of {len(problems)} problems -> {out}")
    if isinstance(weigher, PresetWeigher) and weigher.preset.reliable:
        print(f"reliability of the weights: {weigher.reliability:.2f} of 1 (see docs/method.md)")
    return 0
