"""`compact collect`: asks several teachers a list of questions, and writes their rationales."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from compact.data import Problem, load_questions
from compact.files import check_output, write_json, write_json_lines, write_whole
from compact.options import check_given
from compact.resumable import summary_path
from compact.teachers.collect import Plans, Result, collect, plan
from compact.teachers.export import data_card, find_rows, rows_of
from compact.teachers.ledger import (
    describe_estimate,
    describe_ledger,
    estimate,
    ledger,
    sample_of,
)
from compact.teachers.pace import Patience
from compact.teachers.spec import read_teachers
from compact.teachers.store import Store

if TYPE_CHECKING:
    from compact.evaluation.route import Route

ROUTED_BY = "persyn"
EPILOG = """example:
  compact collect questions.jsonl --teachers teachers.yaml --out rationales.jsonl

Every answer is kept in a store (rationales.sqlite). To resume a killed run, start it again: what is
answered is not asked again. Keys are read from the environment variables that teachers.yaml names.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact collect`."""
    parser.add_argument(
        "questions",
        metavar="QUESTIONS",
        help="JSON lines: question_id, prompt, answer if known",
    )
    parser.add_argument(
        "--teachers", required=True, metavar="FILE", help="YAML list of teachers and endpoints"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument(
        "--store", metavar="FILE", help="all answers and attempts [--out with suffix .sqlite]"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--budget", type=float, metavar="COST", help="most that the store may cost in all"
    )
    parser.add_argument(
        "--dry_run",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="ask N requests of each teacher, estimate the rest, and stop [3]; 0 asks none",
    )
    parser.add_argument(
        "--export_only", action="store_true", help="ask nothing; write what the store has"
    )
    group = parser.add_argument_group("routing: after the first N questions, ask one teacher each")
    group.add_argument(
        "--route", type=int, metavar="N", help="ask all teachers the first N questions only"
    )
    group.add_argument("--student", metavar="MODEL", help="who scores their rationales")
    group.add_argument("--preset", help=f"preset or policy that weighs them [{ROUTED_BY}]")
    defaults = Patience()
    parser.add_argument(
        "--attempts",
        type=int,
        default=defaults.attempts,
        metavar="N",
        help=f"how often a request is sent in one run [{defaults.attempts}]",
    )
    parser.add_argument(
        "--first_wait",
        type=float,
        default=defaults.first_wait,
        metavar="SECONDS",
        help=f"wait before the second attempt, doubled for each further one "
        f"[{defaults.first_wait:g}]",
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact collect`; returns 1 if answers are missing, else 0."""
    check_given(args, "limit", "attempts", least=1)
    check_given(args, "dry_run", "budget", "first_wait", least=0)
    for name in ("student", "preset"):
        if args.route is None and getattr(args, name) is not None:
            raise ValueError(f"--{name} must be used with --route")
    if args.export_only and args.dry_run is not None:
        raise ValueError("--dry_run must be used without --export_only, which asks nothing")
    out = Path(args.out)
    store_file = Path(args.store or out.with_suffix(".sqlite"))
    for path in (out, summary_path(out), _card(out)):  # before anything is paid for
        check_output(path, args.questions, args.teachers, store_file, kind="output")
    if store_file.resolve() == out.resolve():
        raise ValueError(f"--store must be another file than --out, got {store_file}")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    problems = load_questions(args.questions, need_answers=False)[: args.limit]
    plans: Plans = [(t, plan(t, problems)) for t in read_teachers(args.teachers)]
    route = None if args.route is None else _route(args, plans, problems, out)
    store = Store(store_file)
    try:
        if args.dry_run is not None:
            some = plans if route is None else route.first_plans
            if args.dry_run:
                _ask(store, [(t, sample_of(items, args.dry_run)) for t, items in some], args)
            print(describe_estimate(estimate(store, some)))
            if route is not None:
                print(f"then one teacher for each of {len(route.others)} more questions")
            return 0
        results: dict[str, Result] = {}
        about: dict[str, Any] = {}
        try:
            if route is not None:
                ask = None if args.export_only else lambda some: _ask(store, some, args)
                plans, results, about = route.run(store, ask)
            elif not args.export_only:
                results = _ask(store, plans, args)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the answers so far are in {store.path}; the same command continues"
            ) from None
        return _write(store, plans, results, out, args.questions, len(problems), about)
    finally:
        store.close()


def _route(args: argparse.Namespace, plans: Plans, problems: Sequence[Problem], out: Path) -> Route:
    from compact.evaluation.route import Route  # loads torch

    if args.student is None:
        raise ValueError("--route must be given together with --student, who scores")
    scores = out.with_suffix(".route.jsonl")
    return Route(
        plans, problems, args.route, args.student, preset=(args.preset or ROUTED_BY), scores=scores
    )


def _ask(store: Store, plans: Plans, args: argparse.Namespace) -> dict[str, Result]:
    patience = Patience(attempts=args.attempts, first_wait=args.first_wait)
    total = sum(len(items) for _, items in plans)
    with tqdm(total=total, unit="answer") as bar:
        return collect(
            store,
            plans,
            budget=args.budget,
            patience=patience,
            answered=lambda *_: bar.update() and None,
        )


def _card(out: Path) -> Path:
    return out.with_suffix(".card.md")


def _write(
    store: Store,
    plans: Plans,
    results: dict[str, Result],
    out: Path,
    questions: str,
    problems: int,
    route: dict[str, Any],
) -> int:
    """Writes rows, ledger and data card; prints the ledger and what is missing."""
    found = find_rows(store, plans)
    rows, accounts = rows_of(found), ledger(store, found)
    lost = {name: result.reason for name, result in results.items() if result.reason}
    summary: dict[str, Any] = {"teachers": accounts, "given_up": lost}
    write_json(summary_path(out), summary | ({"route": route} if route else {}))
    write_json_lines(out, rows)
    write_whole(_card(out), data_card(found, Path(questions).name, problems))
    print(describe_ledger(accounts))
    if route:
        from compact.evaluation.route import describe_routes

        print(describe_routes(route))
    print(f"{len(rows)} rationales of {problems} questions -> {out}")
    for one in found:
        questions_of = {row["question_id"] for row in one.rows}
        if one.merged and len(one.rows) == len(questions_of):
            print(f"all samples of {one.teacher.name} are equal: its endpoint may not draw any")
        models = sorted({row["model"] for row in one.rows})
        if len(models) > 1:
            print(f"the answers of {one.teacher.name} are those of models {', '.join(models)}")
    missing = {name: account["missing"] for name, account in accounts.items() if account["missing"]}
    if not missing:
        return 0
    words = ", ".join(f"{count} of {name}" for name, count in missing.items())
    for name, reason in lost.items():
        print(f"{name} was given up: {reason}")
    argv = [word for word in sys.argv[1:] if word != "--export_only"]
    print(f"missing: {words}. To ask for them: {shlex.join(['compact', *argv])}")
    return 1
