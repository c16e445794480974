"""What is measured of a score: order within a question, places of wrong steps, teachers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compact.evaluation.bench.collect import STEP_SCORES, WITHOUT_GOLD, weights_of_presets
from compact.evaluation.paired import effect, shares
from compact.metrics import VALIDITY

_DRAWS = 1000
_ORDERS = 20
SIZES = (10, 30, 100, 300, 1000)
"""Numbers of questions from which teachers are ranked."""
Rows = Sequence[Mapping[str, Any]]


class Estimate(NamedTuple):
    """A mean over questions (or rationales) with its 95% interval and their number."""

    value: float
    low: float
    high: float
    number: int


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)


class Contestant(NamedTuple):
    """A score with everything that is measured of it.

    Attributes:
        name, kind: kind is "metric", "preset" or "policy".
        auc: how often a right rationale scores above a wrong one of its question.
        auc_gold: the same among the rationales that state the gold answer.
        mass: share of the weight on right rationales, over the questions that have one; nothing for
            a metric, which gives no weights.
        length: mean rank correlation with the number of tokens, within a question.
        teachers: rank correlation of its order of the teachers with that by share right.
        stability: number of questions -> rank correlation of the order of the teachers from that
            many questions with the order from all.
    """

    name: str
    kind: str
    auc: Estimate
    auc_gold: Estimate
    mass: Estimate
    length: float
    teachers: float
    stability: dict[int, float]


def measure(rows: Rows) -> list[Contestant]:
    """Returns what is measured of every score of the rows, in the order of their `auc`."""
    found = []
    right = [[r["right"] for r in row["rationales"]] for row in rows]
    gold = [[r["right"] if r["states_gold"] else None for r in row["rationales"]] for row in rows]
    tokens = [[r["tokens"] for r in row["rationales"]] for row in rows]
    for (name, kind), of_question in _scores(rows).items():
        lengths = [_spearman(s, t) for s, t in zip(of_question, tokens, strict=True)]
        known = [x for x in lengths if x is not None]
        ranked, stability = _of_teachers(rows, of_question)
        found.append(
            Contestant(
                name,
                kind,
                within(of_question, right),
                within(of_question, gold),
                NOTHING if kind == "metric" else mass(of_question, right),
                float(np.mean(known)) if known else float("nan"),
                ranked,
                stability,
            )
        )
    return sorted(found, key=lambda c: -np.nan_to_num(c.auc.value))


def within(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool | None]]) -> Estimate:
    """Returns the AUC within a question: a tie counts half, a label None does not count.

    Questions without both kinds are left out.
    """
    shares = []
    for of_question, labels in zip(scores, right, strict=True):
        values = np.asarray(of_question, dtype=float)
        high = values[[label is True for label in labels]][:, None]
        low = values[[label is False for label in labels]][None, :]
        if high.size and low.size:
            shares.append(float(np.mean((high > low) + 0.5 * (high == low))))
    return bootstrap_interval(shares)


def mass(weights: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> Estimate:
    """Returns the mean share of the weight that right rationales get.

    Questions without a right rationale, or without any weight, do not count.
    """
    shares = []
    for of_question, labels in zip(weights, right, strict=True):
        values = np.asarray(of_question, dtype=float)
        if any(labels) and values.sum() > 0:
            shares.append(float(values[list(labels)].sum() / values.sum()))
    return bootstrap_interval(shares)


def bootstrap_interval(values: Sequence[float]) -> Estimate:
    """Returns the mean of the values, in 0..1, with a bootstrap interval over them.

    Equal values have no spread to draw from; theirs is the interval of `paired.effect`.
    """
    if not values:
        return NOTHING
    array = np.asarray(values, dtype=float)
    if array.min() == array.max():
        return Estimate(float(array[0]), *shares(effect(array[None, :])), len(array))
    draws = np.random.default_rng(0).integers(0, len(array), (_DRAWS, len(array)))
    low, high = np.quantile(array[draws].mean(1), (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def localisation(rows: Rows) -> dict[str, Estimate]:
    """Returns for each step score how often it is highest at the first wrong step; and chance.

    Rationales with a step that is known to be wrong count. A tie goes to the first step.
    """
    hits: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for rationale in row["rationales"]:
            steps = rationale["steps"]
            wrong = [i for i, step in enumerate(steps) if step["right"] is False]
            if not wrong:
                continue
            for name in (name for name in STEP_SCORES if name in steps[0]):
                values = [step[name] for step in steps]
                hits[name].append(float(values.index(max(values)) == wrong[0]))
            hits["chance"].append(1.0 / len(steps))
    return {name: bootstrap_interval(values) for name, values in hits.items()}


def _scores(rows: Rows) -> dict[tuple[str, str], list[list[float]]]:
    """Returns (name, kind) -> scores of each question."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    first = rows[0]["rationales"][0]
    for kind, field in (("metric", "scores"), ("policy", "weights")):
        for name in first[field]:
            values = [[r[field][name] for r in row["rationales"]] for row in rows]
            found[name, kind] = values
    for name, field in (("judged", VALIDITY), ("agreement", "agreement")):
        if name in first["scores"] and "blind" in first:
            values = [[r["blind"][field] for r in row["rationales"]] for row in rows]
            found[name + WITHOUT_GOLD, "metric"] = values
    for name, flat in weights_of_presets(rows).items():
        each = iter(flat)
        found[name, "preset"] = [[next(each) for _ in row["rationales"]] for row in rows]
    return found


def _of_teachers(rows: Rows, scores: Sequence[Sequence[float]]) -> tuple[float, dict[int, float]]:
    """Returns the rank correlation with the share right, and the stability of the order."""
    names = sorted({r["teacher"] for row in rows for r in row["rationales"]})
    index = {name: i for i, name in enumerate(names)}
    total = np.full((len(rows), len(names)), np.nan)
    right = np.full((len(rows), len(names)), np.nan)
    for q, (row, values) in enumerate(zip(rows, scores, strict=True)):
        for rationale, value in zip(row["rationales"], values, strict=True):
            total[q, index[rationale["teacher"]]] = value
            right[q, index[rationale["teacher"]]] = rationale["right"]
    whole = _means(total)
    ranked = _spearman(whole, _means(right))
    generator = np.random.default_rng(0)
    stability = {}
    for size in SIZES:
        if size >= len(rows):
            break
        orders = []
        for _ in range(_ORDERS):
            part = _means(total[generator.permutation(len(rows))[:size]])
            both = ~np.isnan(part) & ~np.isnan(whole)
            orders.append(_spearman(part[both], whole[both]))
        known = [x for x in orders if x is not None]
        if known:
            stability[size] = float(np.mean(known))
    return float("nan") if ranked is None else ranked, stability


def _means(table: Any) -> Any:
    """Returns the mean of each column over the rows that have it; nan if none has."""
    counts = (~np.isnan(table)).sum(0)
    return np.where(counts > 0, np.nansum(table, 0) / np.maximum(counts, 1), np.nan)


def _spearman(a: Any, b: Any) -> float | None:
    """Returns the rank correlation; None if a side is constant or there are fewer than 2 values."""
    if len(a) < 2:
        return None
    ranks = [_ranks(x) for x in (a, b)]
    centred = [r - r.mean() for r in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum() / scale) if scale else None


def _ranks(values: Any) -> Any:
    """Returns the rank of each value; equal values have the mean of their ranks."""
    _, place, counts = np.unique(
        np.asarray(values, dtype=float), return_inverse=True, return_counts=True
    )
    return (np.cumsum(counts) - (counts - 1) / 2.0)[place]
