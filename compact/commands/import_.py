"""`compact import`: converts files of other projects to rationales, JSON lines."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from compact.data.importers import import_files
from compact.data.problems import load_problems
from compact.files import check_output, write_whole

EPILOG = """example:
  compact import gpt-4o=gpt4.json human=human.json --gold human.json --out train.jsonl

Files: JSON lines, a JSON array, CSV, Parquet, or hub:OWNER/NAME[:CONFIG][@SPLIT].
Formats: alpaca, sharegpt (both as in LLaMA-Factory), MCC-KD, Question/CoT/Answer, GSM8K, TRL, ours.
Rows with the same prompt become one problem. Without TEACHER=, the teacher is the file's stem.
A teacher's second rationale of a problem is that of TEACHER-2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact import`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("files", nargs="+", metavar="[TEACHER=]FILE", help="rationales to read")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--gold", metavar="FILE", help="gold answers, matched by prompt")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="keep at most N rationales of a teacher for a problem [all]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact import`; returns the exit status."""
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {args.samples}")
    sources = []
    for text in args.files:
        name, equals, path = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        if named and not (name and path):
            raise ValueError(f"files must be [TEACHER=]FILE, got {text!r}")
        sources.append((name, Path(path)) if named else (None, Path(text)))
    golds = [Path(args.gold)] if args.gold else []
    out = check_output(args.out, *(path for _, path in sources), *golds, kind="rationales")
    gold = Path(args.gold) if args.gold else None
    rows, left_out = import_files(sources, gold, prefix=out.stem, samples=args.samples)
    problems = load_problems(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    write_whole(out, text, kind="rationales")
    teachers = Counter(row["teacher"] for row in rows)
    listed = ", ".join(f"{teacher} {count}" for teacher, count in teachers.most_common(6))
    more = ", ..." if len(teachers) > 6 else ""
    without = sum(problem.answer is None for problem in problems)
    no_gold = f", problems without a gold answer: {without}" if without else ""
    print(
        f"{len(problems)} problems, {len(rows)} rationales of {len(teachers)} teachers "
        f"({listed}{more}), rationales left out: {left_out}{no_gold} -> {out}"
    )
    return 0
