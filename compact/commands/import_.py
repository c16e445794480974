"""`compact import`: converts files of other projects to rationales, JSON lines."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

from compact.data.importers import import_files
from compact.data.problems import Problem, load_problems
from compact.files import check_output, write_json_lines
from compact.options import check_given

EPILOG = """example:
  compact import gpt-4o=gpt4.json human=human.json --gold human.json --out train.jsonl \\
      --test_out test.jsonl

Files: JSON lines, a JSON array, CSV, Parquet, or hub:OWNER/NAME[:CONFIG][@SPLIT].
Formats: alpaca, sharegpt (both as in LLaMA-Factory), MCC-KD, Question/CoT/Answer, GSM8K, TRL, ours.
Rows with the same prompt become one problem. Without TEACHER=, the teacher is the file's stem.
If a teacher has two rationales of any problem, all of its rationales are renamed: the first of a
problem is that of TEACHER-1, the second that of TEACHER-2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact import`."""
    parser.add_argument("files", nargs="+", metavar="[TEACHER=]FILE", help="rationales to read")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="one row a question: these fields hold the rationales of a teacher each",
    )
    parser.add_argument("--gold", metavar="FILE", help="gold answers, matched by prompt")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="keep at most N rationales of a teacher for a problem [all]",
    )
    parser.add_argument(
        "--test_out",
        metavar="FILE",
        help="writes some questions here in place of --out, for a test",
    )
    parser.add_argument(
        "--test_share", type=float, metavar="F", help="share of the questions in --test_out [0.1]"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact import`; returns the exit status."""
    check_given(args, "samples", least=1)
    check_given(args, "test_share", above=0, below=1)
    if args.test_share is not None and args.test_out is None:
        raise ValueError("--test_share needs --test_out, got none")
    share = 0.1 if args.test_share is None else args.test_share
    sources = []
    for text in args.files:
        name, equals, path = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        if named and not (name and path):
            raise ValueError(f"files must be [TEACHER=]FILE, got {text!r}")
        if named and args.columns:
            raise ValueError(f"--columns names the teachers; files must be FILE, got {text!r}")
        sources.append((name, Path(path)) if named else (None, Path(text)))
    gold = Path(args.gold) if args.gold else None
    inputs = [path for _, path in sources] + ([gold] if gold else [])
    out = check_output(args.out, *inputs, kind="rationales")
    test_out = None
    if args.test_out is not None:
        if Path(args.test_out).resolve() == out.resolve():
            raise ValueError(f"--test_out must be another file than --out, got {args.test_out}")
        test_out = check_output(args.test_out, *inputs, kind="rationales")
    rows, left_out, empty = import_files(
        sources, gold, prefix=out.stem, samples=args.samples, columns=args.columns
    )
    problems = load_problems(rows)
    held: set[str] = set()
    if test_out is not None:
        held = _held_out(problems, share)
        tested = (row for row in rows if row["question_id"] in held)
        write_json_lines(test_out, tested, kind="rationales")
    trained = [row for row in rows if row["question_id"] not in held]
    write_json_lines(out, trained, kind="rationales")
    teachers = Counter(row["teacher"] for row in trained)
    listed = ", ".join(f"{teacher} {count}" for teacher, count in teachers.most_common(6))
    more = ", ..." if len(teachers) > 6 else ""
    without = sum(p.answer is None for p in problems)  # of the test all have one
    print(
        f"{len(problems) - len(held)} problems, {len(trained)} rationales of "
        f"{len(teachers)} teacher{'s'[: len(teachers) != 1]} ({listed}{more}) -> {out}"
    )
    if held:
        print(f"{len(held)} problems for a test -> {test_out}")
    if left_out:
        print(f"rationales left out: {left_out}")
    if empty:
        print(f"rows without a rationale: {empty}")
    if without:
        print(f"problems without a gold answer: {without}")
    return 0


def _held_out(problems: list[Problem], share: float) -> set[str]:
    """Returns the questions of the test, of those with a gold answer.

    A hash of the prompt decides: with more teachers or samples the same questions are held out.
    """
    usable = [problem for problem in problems if problem.answer is not None]
    count = min(max(round(share * len(problems)), 1), len(problems) - 1)
    if not 0 < count <= len(usable):
        raise ValueError(
            f"--test_out must hold out {max(count, 1)} of the problems with a gold answer and keep "
            f"one for training; of {len(problems)} problems, {len(usable)} have a gold answer"
        )

    def rank(problem: Problem) -> str:
        return hashlib.sha256(json.dumps(problem.prompt).encode()).hexdigest()

    return {problem.question_id for problem in sorted(usable, key=rank)[:count]}
