"""Counts how often the paired test of `compact compare` rejects, on drawn differences of two arms.

    python tools/paired_rates.py [--draws 2000] [--seeds 3 5]

The differences of 300 questions are normal, with the variances that the pairs of the study have:
`rest` of single answers, `questions` of a question's mean. `seed sd` is the standard deviation of
a seed's mean. A test at 5% should reject a difference of 0 in .05 of the draws. Prints the table of
docs/results/paired.md.
"""

from __future__ import annotations

import argparse
import itertools
import math

import numpy as np

from compact.evaluation.paired import effect

QUESTIONS, REST = 300, 0.14
COLUMNS = ((0.0, 0.05), (0.0, 0.01), (0.05, 0.05))
"""True difference and level of the test, for each column."""


def p_values(
    seeds: int, seed_sd: float, of_questions: float, true: float, draws: int
) -> list[float]:
    """Returns the p of each draw."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        values = true + math.sqrt(of_questions) * random.normal(size=QUESTIONS)
        values = values + seed_sd * random.normal(size=(seeds, 1))
        values += math.sqrt(REST) * random.normal(size=(seeds, QUESTIONS))
        found.append(effect(values).p)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2_000, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5], metavar="N")
    args = parser.parse_args()
    draws: int = args.draws
    heads = [f"difference {true:.2f}, at {level:.0%}" for true, level in COLUMNS]
    print(f"| seeds | variance of questions | seed sd | {' | '.join(heads)} |")
    print("|--:|--:|--:|" + "--:|" * len(COLUMNS))
    for seeds, of_questions, sd in itertools.product(args.seeds, (0.0, 0.06), (0.0, 0.03, 0.06)):
        drawn = {true: p_values(seeds, sd, of_questions, true, draws) for true in dict(COLUMNS)}
        shares = [sum(p < level for p in drawn[true]) / draws for true, level in COLUMNS]
        cells = [str(seeds), f"{of_questions:.2f}", f"{sd:.2f}", *(f"{x:.3f}" for x in shares)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
