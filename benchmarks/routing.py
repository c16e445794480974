"""Replays `compact collect --route` on data in which every teacher answered every question.

    python -m benchmarks.routing ../shared/data/asdiv/train.jsonl --first 200

The first N questions are drawn anew for each repeat; the router learns on them, and the others are
routed. The weights are those of `rejection` (equal among the rationales that state the gold
answer), or those of `compact score`, given as --scores.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compact.data import Problem, load_problems, text_of
from compact.teachers.router import fit_router

Array = NDArray[np.float64]


def complete(files: list[Path], without: list[str]) -> tuple[list[Problem], list[str]]:
    """Returns the problems and the teachers that can be compared.

    The teachers are those in every file, except `without`; the problems, those that all of these
    teachers answered.
    """
    sets = [load_problems(path) for path in files]
    named = [{r.teacher for p in problems for r in p.rationales} for problems in sets]
    teachers = sorted(set.intersection(*named) - set(without))
    kept = [
        replace(p, rationales=tuple(r for r in p.rationales if r.teacher in teachers))
        for problems in sets
        for p in problems
    ]
    return [p for p in kept if len(p.rationales) == len(teachers)], teachers


def table(problems: list[Problem], teachers: list[str], scores: Path | None) -> tuple[Array, ...]:
    """Returns [P, K]: whether each answer is right, the weights, and the characters written."""
    right = np.zeros((len(problems), len(teachers)))
    written, weights = right.copy(), right.copy()
    place = {(p.question_id, t): (i, k) for i, p in enumerate(problems)
             for k, t in enumerate(teachers)}  # fmt: skip
    for problem in problems:
        for r in problem.rationales:
            at, text = place[problem.question_id, r.teacher], text_of(r.completion)
            right[at] = problem.domain.matches(problem.domain.extract(text), problem.answer)
            written[at] = len(text)
    if scores is None:
        weights = right / right.sum(1, keepdims=True).clip(min=1)
    else:
        for line in scores.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if (key := (row["question_id"], row["teacher"])) in place:
                weights[place[key]] = row["weight"]
    return right, weights, written


def replay(
    texts: list[str], right: Array, weights: Array, written: Array, first: int, seed: int
) -> dict[str, Array]:
    """Returns way of choosing -> (share right, mean weight, requests, characters).

    Share and weight are of the questions after the first; requests and characters, of all
    questions, are shares of what asking everybody takes.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    head, tail = order[:first], order[first:]
    router = fit_router([texts[i] for i in head], weights[head])
    routed = np.array(router.choose([texts[i] for i in tail]))
    each = np.arange(len(tail))
    single = np.full(len(tail), weights[head].mean(0).argmax())
    ways = {"one at random": None, "best single": single, "routed": routed}
    ways["best in hindsight"] = weights[tail].argmax(1)
    k, everything = right.shape[1], written.sum()
    found = {}
    for name, chosen in ways.items():
        if chosen is None:
            values = [x[tail].mean() for x in (right, weights)]
            text = written[tail].mean(1).sum()
        else:
            values = [x[tail][each, chosen].mean() for x in (right, weights)]
            text = written[tail][each, chosen].sum()
        requests = (k * first + len(tail)) / (k * len(texts))
        found[name] = np.array([*values, requests, (written[head].sum() + text) / everything])
    found["everybody"] = np.array([right[tail].mean(), weights[tail].mean(), 1.0, 1.0])
    found["words are read"] = np.array([float(router.reads_words)] * 4)
    return found


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--without", nargs="*", default=[], help="teachers to leave out")
    parser.add_argument("--scores", type=Path, help="rows of `compact score` for the same data")
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    problems, teachers = complete(args.data, args.without)
    if args.scores:
        lines = args.scores.read_text(encoding="utf-8").splitlines()
        scored = {json.loads(line)["question_id"] for line in lines}
        problems = [p for p in problems if p.question_id in scored]
    right, weights, written = table(problems, teachers, args.scores)
    texts = [text_of(p.prompt) for p in problems]
    runs = [
        replay(texts, right, weights, written, args.first, seed) for seed in range(args.repeats)
    ]
    print(f"{len(problems)} questions, {len(teachers)} teachers, first {args.first}, ", end="")
    print(f"{args.repeats} draws; words read in {sum(r['words are read'][0] for r in runs):.0f}")
    print(", ".join(f"{t} {s:.3f}" for t, s in zip(teachers, right.mean(0), strict=True)))
    print("| who is asked | right | sd | weight | requests | text |\n|---|---|---|---|---|---|")
    for name in ("everybody", "one at random", "best single", "routed", "best in hindsight"):
        values = np.array([run[name] for run in runs])
        share, weight, requests, text = values.mean(0)
        cells = (f"{x:.3f}" for x in (share, values[:, 0].std(), weight, requests, text))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
