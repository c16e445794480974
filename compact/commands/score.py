"""`compact score`: scores and weighs rationales without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compact.data import Problem, load_problems, of_teacher
from compact.data.rows import as_json_lines, content_of_rows
from compact.evaluation.imported import imports_of
from compact.evaluation.keep import NAMES, best_of, kept_by
from compact.evaluation.teachers import about, reasons, teachers_page
from compact.files import check_output, content_of_student, write_json_lines, write_whole
from compact.options import check_given
from compact.resumable import remove_rows
from compact.settings import DEFAULT_PRESET, LEAF_BUDGET, MAX_LENGTH

EPILOG = """example:
  compact score rationales.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --out scores.jsonl
  compact score rationales.jsonl --model STUDENT --metric consensus=answer --out scores.jsonl
  compact score rationales.jsonl --model STUDENT --out scores.jsonl \\
    --keep 'weight > 0.5/K' --kept kept.jsonl
"""

_EXAMPLES = 10
_ANY_ROW = {"question_id": "", "weight": 0.41}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact score`."""
    parser.add_argument("data", metavar="DATA", help="rationales (docs/data-format.md)")
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
        "--teachers", metavar="FILE", help="also write a page about each teacher, Markdown"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--keep",
        metavar="EXPR",
        help=f"rationales to write to --kept, as 'weight > 0.5/K'; reads {', '.join(NAMES)}",
    )
    chosen.add_argument(
        "--top", type=int, metavar="N", help="keep the N rationales of each problem that weigh most"
    )
    parser.add_argument(
        "--kept", metavar="FILE", help="data set of the rationales of --keep or --top, JSON lines"
    )
    parser.add_argument(
        "--graphs", metavar="FOLDER", help="save each problem's consensus graph (see compact graph)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument(
        "--max_length", type=int, default=MAX_LENGTH, metavar="N", help=f"tokens [{MAX_LENGTH}]"
    )
    parser.add_argument(
        "--leaf_budget",
        type=float,
        default=LEAF_BUDGET,
        metavar="X",
        help=f"most tokens of answer leaves, as a share of a row's tokens [{LEAF_BUDGET}]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact score`; returns the exit status."""
    check_given(args, "limit", least=1)
    if not args.leaf_budget > 0:
        raise ValueError(f"--leaf_budget must be above 0, got {args.leaf_budget}")
    if (args.kept is None) != (args.keep is None and args.top is None):
        raise ValueError("--kept must be given together with --keep or --top")
    if args.keep is not None:
        kept_by([], args.keep)
    elif args.top is not None:
        best_of([], args.top)
    problems = load_problems(args.data)[: args.limit]
    outputs = {"--out": (args.out, "scores")}
    outputs |= {"--kept": (args.kept, "rationales")} if args.kept is not None else {}
    outputs |= {"--teachers": (args.teachers, "teachers")} if args.teachers is not None else {}
    paths = [check_output(p, args.data, args.model, kind=kind) for p, kind in outputs.values()]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"{', '.join(outputs)} must be different files")
    # What needs no torch is refused before it loads, which takes seconds.
    from compact.evaluation.score import parse_metrics, score_problems
    from compact.metrics import METRICS
    from compact.student import Student, load_model
    from compact.weighting import POLICIES, PRESETS, PresetWeigher, check_gold, make_weigher

    overrides = parse_metrics(args.metric)
    weigher = make_weigher(args.preset, **overrides)
    if weigher.teacher is not None:
        of_teacher(weigher.teacher, problems)  # raises if the teacher has no rationales
    check_gold(weigher, problems)
    if args.keep is not None:  # whether the rows will have what it reads, with any scores
        axes = weigher.all_metrics if isinstance(weigher, PresetWeigher) else {}
        kept_by([dict.fromkeys(axes, 0.37) | _ANY_ROW], args.keep)
    out = paths[0]
    graphs = Path(args.graphs) if args.graphs else None
    if graphs:
        graphs.mkdir(parents=True, exist_ok=True)
    model, processing_class = load_model(args.model)
    settings = {
        "data": content_of_rows(args.data),
        "limit": args.limit,
        "model": args.model,
        "weights": content_of_student(args.model),
        "preset": args.preset,
        "metrics": overrides,
        "max_length": args.max_length,
        "leaf_budget": args.leaf_budget,
        "graphs": args.graphs,
        **imports_of([args.preset, *overrides.values()], (METRICS, PRESETS, POLICIES)),
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
    write_json_lines(out, rows, kind="scores")
    print(f"{len(rows)} rationales of {len(problems)} problems -> {out}")
    for sentence in about(rows):
        print(f"  {sentence}")
    if args.teachers is not None:
        write_whole(Path(args.teachers), teachers_page(rows), kind="teachers")
        print(f"about each teacher -> {args.teachers}")
    if args.kept is not None:
        kept = kept_by(rows, args.keep) if args.keep is not None else best_of(rows, args.top)
        _write_kept(Path(args.kept), args.data, problems, kept)
        _print_dropped(rows, kept)
        print(f"{sum(kept)} of {len(rows)} rationales -> {args.kept}")
    remove_rows(partial)
    return 0


def _write_kept(path: Path, data: str, problems: Sequence[Problem], kept: Sequence[bool]) -> None:
    """Writes the rows of the data whose rationales are kept."""
    numbers = [r.line for problem in problems for r in problem.rationales]
    chosen = {line for line, keep in zip(numbers, kept, strict=True) if keep}
    text = as_json_lines(data, chosen)
    write_whole(path, text, kind="rationales")


def _print_dropped(rows: Sequence[dict[str, Any]], kept: Sequence[bool]) -> None:
    """Prints examples of what is left out, each with its reason."""
    dropped = [row for row, keep in zip(rows, kept, strict=True) if not keep]
    for row in dropped[:_EXAMPLES]:
        words = "; ".join(reasons(row)) or "the others suit the student better"
        print(f"  left out: {row['question_id']} {row['teacher']} {row['weight']:.2f}: {words}")
    if len(dropped) > _EXAMPLES:
        print(f"  ... and {len(dropped) - _EXAMPLES} more; field findings of the scores says why")
