"""Compares arms on the same test questions: intervals and paired tests over questions and seeds.

An arm has a matrix x [S, Q]: was question q answered rightly with seed s. The mean of x, or of the
differences of two arms, has the variance of a two-way layout with random rows and columns:

    Var = (MS_q + MS_s - MS_e) / (S Q)

MS_q, MS_s, MS_e are the mean squares of questions, seeds and the rest (two-way analysis of variance
without replication), with Q - 1, S - 1 and (S - 1) (Q - 1) degrees of freedom.

A factor (questions or seeds) is left out if its mean square is at most MS_e times the median of F.
A factor without effect is below it in half of the samples. Var is then MS_q / (S Q) without seeds,
MS_s / (S Q) without questions, MS_e / (S Q) without both. The mean square of a factor that is kept
counts as MS_e at least. The degrees of freedom of Var are df in

    S Q Var / df = MS_q / (Q - 1) + MS_s / (S - 1) - MS_e / ((S - 1) (Q - 1))

over what is kept: 1 / df is the mean of the parts' 1 / df, weighted by their variance (as Cochran
and Cox weight the t values of two samples, Experimental Designs, 1957). With Satterthwaite's df and
three seeds, a test at 5% rejects up to 7.5% of true hypotheses. `tools/paired_rates.py` counts how
often the test rejects; docs/results/paired.md has the table.

With one seed only the questions vary: Var = MS_q / Q with Q - 1 degrees of freedom. So an interval
is about other questions of the same kind and about other seeds. If all values are equal, the
interval has the share of other values that would show none in Q questions with a probability of 5%
(the "rule of three"), and p is that of the sign test.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compact.text.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = ("rejection", "uniform")
"""The arms that all others are tested against, where they were run."""
DEVELOPMENT = "development"
"""Name of the questions that choose among the arms single:TEACHER. They are in no table."""
_EQUAL = 1e-6  # values that differ by less are equal, but for rounding
_MOST_DF = 10_000.0  # with more degrees of freedom, Student's t is normal to 4 digits
_BEST = "best single "
_FIELDS = ("arm", "seed", "test", "right")

Answers = dict[str, dict[str, NDArray[np.float64]]]
"""Test -> arm -> [S, Q] 1 where the question was answered rightly with the seed, else 0."""


class Effect(NamedTuple):
    """A mean over seeds and questions.

    Attributes:
        mean: the mean.
        low, high: its 95% interval.
        p: two-sided p-value of the hypothesis that the true mean is 0.
        detectable: the smallest true mean that a test at 5% finds with a power of 80%.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float


def effect(values: ArrayLike) -> Effect:
    """Returns the mean of `values` ([S, Q], or [Q] of one seed) and what is known about it.

    Where nothing can be known (one question and one seed), the interval is infinite and p is 1. If
    all values are equal, nothing is known about what is detectable: it is infinite.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))
    seeds, questions = values.shape
    mean = float(values.mean())
    if seeds * questions == 1:
        return Effect(mean, -math.inf, math.inf, 1.0, math.inf)
    if float(np.ptp(values)) < _EQUAL:  # but one more might have been another
        count = questions if questions > 1 else seeds
        half, sign = 1.0 - 0.05 ** (1.0 / count), 1.0 if abs(mean) < _EQUAL else 2.0 * 0.5**count
        return Effect(mean, mean - half, mean + half, min(sign, 1.0), math.inf)
    df_q, df_s = questions - 1, seeds - 1
    df_e = df_q * df_s
    by_question, by_seed = values.mean(0), values.mean(1)
    ms_q = seeds * _mean_square(by_question - mean, df_q)
    ms_s = questions * _mean_square(by_seed - mean, df_s)
    ms_e = _mean_square(values - by_question - by_seed[:, None] + mean, df_e)
    kept = [
        (max(ms, ms_e), df)
        for ms, df in ((ms_q, df_q), (ms_s, df_s))
        if ms > ms_e * _chi_square_median(df) / _chi_square_median(df_e)
    ]
    if len(kept) != 1:
        kept.append((-ms_e if kept else ms_e, df_e))
    variance = sum(ms for ms, _ in kept)
    df = max(variance / sum(ms / df for ms, df in kept), 1.0)
    error = math.sqrt(variance / (seeds * questions))
    half = t_quantile(0.975, df) * error
    detectable = half + t_quantile(0.8, df) * error
    return Effect(mean, mean - half, mean + half, two_sided(mean / error, df), detectable)


def _chi_square_median(df: int) -> float:
    """Returns about the median of chi-square over df (Wilson and Hilferty, PNAS 17, 1931)."""
    return (1.0 - 2.0 / (9.0 * max(df, 1))) ** 3


def _mean_square(deviations: NDArray[np.float64], df: int) -> float:
    return float(np.square(deviations).sum()) / df if df else 0.0


def two_sided(t: float, df: float) -> float:
    """Returns P(|T| > |t|) of Student's t with df >= 1 degrees of freedom.

    With T = sqrt(df) tan(a) the density is a power of cos(a), which Simpson's rule integrates.
    """
    df = min(df, _MOST_DF)
    start = math.atan(abs(t) / math.sqrt(df))
    angles = np.linspace(start, math.pi / 2, 2_001)
    heights = np.maximum(np.cos(angles), 0.0) ** (df - 1.0)
    step = (math.pi / 2 - start) / 2_000
    area = step / 3 * float(heights[0] + heights[-1] + 4 * heights[1::2].sum())
    area += step / 3 * 2 * float(heights[2:-1:2].sum())
    scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)
    return min(2 * math.exp(scale) * area, 1.0)


def t_quantile(share: float, df: float) -> float:
    """Returns the value below which `share` (.5 to 1) of Student's t lies; df >= 1."""
    low, high = 0.0, 1.0
    tail = 2.0 * (1.0 - share)
    while two_sided(high, df) > tail:
        high *= 2.0
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2


def holm(values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number (Holm, Scandinavian J. of Statistics 6, 1979)."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min((len(values) - rank) * values[index], 1.0))
        adjusted[index] = largest
    return adjusted


def answers_of(runs: Iterable[Mapping[str, Any]]) -> Answers:
    """Returns the answers of runs.

    Args:
        runs: arm, seed and right (test -> text with 1 or 0 for each question).

    Raises:
        ValueError: the arms have different seeds, or different numbers of questions.
    """
    rows: dict[str, dict[str, dict[int, str]]] = {}
    for run in runs:
        for test, right in run["right"].items():
            rows.setdefault(test, {}).setdefault(run["arm"], {})[run["seed"]] = right
    found: Answers = {}
    for test, arms in rows.items():
        seeds = sorted(next(iter(arms.values())))
        questions = len(next(iter(arms.values()))[seeds[0]])
        for arm, texts in arms.items():
            if sorted(texts) != seeds or {len(text) for text in texts.values()} != {questions}:
                raise ValueError(
                    f"{test}: expected seeds {seeds} and {questions} questions of every arm, got "
                    f"seeds {sorted(texts)} of {arm!r} with {sorted(map(len, texts.values()))}"
                )
            matrix = [[float(c == "1") for c in texts[seed]] for seed in seeds]
            found.setdefault(test, {})[arm] = np.array(matrix)
    return found


def as_csv(runs: Iterable[Mapping[str, Any]]) -> str:
    """The answers of runs as CSV, a row per run and test; `read_csv` reads it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for run in runs:
        for test, right in run["right"].items():
            writer.writerow([run["arm"], run["seed"], test, right])
    return text.getvalue()


def read_csv(path: str | Path) -> Answers:
    """Reads what `as_csv` wrote.

    Raises:
        ValueError: a line is not of this form; the message names it.
        OSError: the file cannot be read.
    """
    runs = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1 and tuple(row) == _FIELDS:
                continue
            ok = number > 1 and len(row) == len(_FIELDS) and row[1].isdecimal()
            if not ok or not row[3] or set(row[3]) - {"0", "1"}:
                raise ValueError(
                    f"{path}:{number}: expected {', '.join(_FIELDS)} (zeros and ones), got "
                    f"{','.join(row)[:60]!r}"
                )
            runs.append({"arm": row[0], "seed": int(row[1]), "right": {row[2]: row[3]}})
    return answers_of(runs)


def with_best_single(answers: Answers) -> Answers:
    """Adds the arm "best single": the single teacher that is best on the development questions.

    The best one has the highest mean over the seeds. All tests show the same one. Nothing is added
    if there are no development questions, or fewer than two arms single:TEACHER. The result has no
    development questions.
    """
    singles = {
        arm: right.mean()
        for arm, right in answers.get(DEVELOPMENT, {}).items()
        if arm.startswith("single:")
    }
    tests = {test: dict(arms) for test, arms in answers.items() if test != DEVELOPMENT}
    if len(singles) > 1:
        best = max(singles, key=lambda arm: singles[arm])
        for arms in tests.values():
            arms[f"{_BEST}({best.removeprefix('single:')})"] = arms[best]
    return tests


def paired_rows(answers: Answers) -> list[dict[str, Any]]:
    """Returns a row per test and arm.

    Returns:
        test, arm, seeds, questions, accuracy (`Effect`), and `against`: baseline -> (the `Effect`
        of the paired differences, its p-value after Holm's adjustment over the arms of the test).
        The arm "best single" is a copy: it has the p-value of its single:TEACHER and adds none.
    """
    rows = []
    for test, arms in answers.items():
        against: dict[str, dict[str, tuple[Effect, float]]] = {arm: {} for arm in arms}
        for baseline in BASELINES:
            if baseline not in arms:
                continue
            others = {a: effect(x - arms[baseline]) for a, x in arms.items() if a != baseline}
            tested = [arm for arm in others if not arm.startswith(_BEST)]
            adjusted = dict(zip(tested, holm([others[a].p for a in tested]), strict=True))
            for arm, found in others.items():
                against[arm][baseline] = (found, adjusted[_original(arm)])
        for arm, right in arms.items():
            seeds, questions = right.shape
            rows.append(
                {
                    "test": test,
                    "arm": arm,
                    "seeds": seeds,
                    "questions": questions,
                    "accuracy": effect(right),
                    "against": against[arm],
                }
            )
    return rows


def _original(arm: str) -> str:
    """Returns the arm whose answers `arm` has: single:TEACHER of "best single (TEACHER)"."""
    return f"single:{arm[len(_BEST) + 1 : -1]}" if arm.startswith(_BEST) else arm


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `paired_rows` as one Markdown table."""
    baselines = [b for b in BASELINES if any(b in row["against"] for row in rows)]
    head = ["test", "arm", "accuracy"]
    for baseline in baselines:
        head += [f"over {baseline}", "p", "detectable"]
    table = []
    for row in rows:
        low, high = shares(row["accuracy"])
        cells = [row["test"], row["arm"]]
        cells.append(f"{row['accuracy'].mean:.3f} ({low:.3f} to {high:.3f})")
        for baseline in baselines:
            if baseline not in row["against"]:
                cells += ["-"] * 3
                continue
            found, p = row["against"][baseline]
            cells.append(f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
            cells += [f"{p:.3f}", f"{found.detectable:.3f}"]
        table.append(cells)
    return "\n".join(markdown_table(head, table)) + "\n"


def shares(found: Effect, least: float = 0.0) -> tuple[float, float]:
    """Returns the ends of an interval of accuracies, or of their differences with least = -1."""
    return max(found.low, least), min(found.high, 1.0)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws a panel per test: the accuracy of each arm with its interval."""
    from matplotlib.figure import Figure

    tests = list(dict.fromkeys(row["test"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    heights = {arm: len(arms) - 1 - i for i, arm in enumerate(arms)}
    figure = Figure(figsize=(2.6 + 3.4 * len(tests), 1.4 + 0.3 * len(arms)), dpi=130)
    panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
    for axes, test in zip(panels, tests, strict=True):
        mine = [row for row in rows if row["test"] == test]
        means = [row["accuracy"].mean for row in mine]
        ys = [heights[row["arm"]] for row in mine]
        ends = [shares(row["accuracy"]) for row in mine]
        below = [max(m - low, 0.0) for m, (low, _) in zip(means, ends, strict=True)]
        above = [max(high - m, 0.0) for m, (_, high) in zip(means, ends, strict=True)]
        axes.errorbar(means, ys, xerr=[below, above], fmt="none", ecolor="#7a8794", capsize=3)
        axes.scatter(means, ys, color="#1b6ca8", zorder=3)
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.set_xlabel(f"accuracy on {test} (95% interval)", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    short = [arm.partition(",strategy_options=")[0] for arm in arms]
    names = short if len(set(short)) == len(arms) else arms
    panels[0].set_yticks(list(heights.values()), names, fontsize=8)
    return figure
