"""Which scores prefer reasons to leaks? `python -m benchmarks.leaks [--questions N]`.

Builds the leak zoo (`compact.lab.leaks`) from real rationales and scores every variant with
SmolLM2-135M. The share of questions in which one kind scores above another is printed as the table
of docs/leaks.md. Rows go to --rows, so that a killed run continues. The cue and the reading of the
question were chosen on the first half of each file; the questions here are of the second half.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, machine
from compact.data import load_problems
from compact.evaluation.paired import effect
from compact.lab.leaks import KINDS, leak_zoo
from compact.metrics import get_metric
from compact.metrics.gain import final_level
from compact.metrics.option_contrast import option_leaves
from compact.passes import Pass
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.resumable import ResumableRows
from compact.student import Student, load_student, smollm2_path

DATA = ("openbookqa", "strategyqa")
METRICS = ("gain", "option-contrast", "leak-adjusted", "posterior-consensus")
PAIRS = (
    ("gold", "vacuous"),
    ("gold", "leak-only"),
    ("gold-leak", "vacuous"),
    ("gold-leak", "leak-only"),
    ("gold", "wrong-facts"),
    ("gold", "other"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def gold_option(pass_: Pass) -> torch.Tensor:
    """Returns [R] the log-likelihood of the gold option's text after the whole rationale."""
    leaves, logp = option_leaves(pass_, "log p")
    gold = leaves.gold[pass_.batch.problem]
    return logp[leaves.offsets[leaves.whole] + gold]


def scores(pass_: Pass) -> dict[str, list[float]]:
    """Returns score -> one value per variant."""
    found = {
        "log p(gold answer) at the end": final_level(pass_),
        "log p(gold option) at the end": gold_option(pass_),
        **{f"`{name}`": get_metric(name).score(pass_) for name in METRICS},
    }
    return {name: values.float().tolist() for name, values in found.items()}


def share(rows: list[dict[str, Any]], name: str, over: str, under: str) -> tuple[float, float]:
    """Returns how often `over` scores above `under` (a tie is half), and half its 95% interval."""
    won = []
    for row in rows:
        mine = dict(zip(KINDS, row["scores"][name], strict=True))
        won.append((mine[over] > mine[under]) + 0.5 * (mine[over] == mine[under]))
    found = effect(won)
    return found.mean, found.high - found.mean


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of one data set."""
    lines = ["| score | " + " | ".join(f"{over} > {under}" for over, under in PAIRS) + " |"]
    lines.append("|---" * (len(PAIRS) + 1) + "|")
    for name in rows[0]["scores"]:
        cells = [share(rows, name, *pair) for pair in PAIRS]
        lines.append(
            f"| {name} | " + " | ".join(f"{s:.2f} ± {half:.2f}" for s, half in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Scores the zoo of both data sets and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", metavar="DIR")
    parser.add_argument("--questions", type=int, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    model, tokenizer = load_student(smollm2_path(), dtype=DTYPES[args.dtype])
    student = Student.of(model, tokenizer)
    settings = {"questions": args.questions, "seed": args.seed, "dtype": args.dtype}
    with ResumableRows(args.rows, settings, key="question_id") as store:
        for name in DATA:
            problems = load_problems(args.data / name / "train.jsonl")
            zoo = leak_zoo(problems[len(problems) // 2 :], seed=args.seed, limit=args.questions)
            for problem in zoo:
                if problem.question_id in store.done:
                    continue
                encoded = encode_problem(
                    problem, tokenizer, max_length=1024, options=True, leaf_budget=9.0
                )
                found = scores(observe(student, [encoded], options=True))
                store.append({"question_id": problem.question_id, "data": name, "scores": found})
        store.complete({})
        for name in DATA:
            rows = [row for row in store.done.values() if row["data"] == name]
            print(f"\n{name}, {len(rows)} questions\n\n{table(rows)}")


if __name__ == "__main__":
    main()
