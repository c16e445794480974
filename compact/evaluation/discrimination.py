"""Measures how well each score separates right rationales from wrong ones: within-problem AUC.

`compact discrimination` runs these studies and writes a table and a picture.

Every metric of the registry scores the same rationales; so does every preset and policy, by the
weight it gives. AUC of a kind of error: the probability that a right rationale scores above one
with that error in the same problem (a tie counts half); 0.5 is chance. Column "verbose": how often
the brief right rationale scores above the long-winded one; 0.5 is best.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from compact.data import Problem, load_problems
from compact.lab import zoo
from compact.lab.planted import PLANTS
from compact.lab.zoo_student import STAGES, load_zoo_student
from compact.metrics import METRICS, get_metric, metric_names, statistics_of
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import encode_problems
from compact.passes.forward import observe
from compact.passes.packing import Layout
from compact.student import Student, load_student
from compact.weighting import PRESETS, PresetWeigher, make_weigher

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZOO_TEACHERS = ("good", "verbose", "wrong-step", "unrelated", "right-answer-wrong-steps")
POLICIES = ("answer-vote", "softmax-nll", "ca-mkd", "ebkd")
Labels = Mapping[tuple[str, str], str]
"""(question_id, teacher) -> kind of the rationale: "right", or the kind of its error."""


def score_everything(
    student: Student,
    problems: Sequence[EncodedProblem],
    with_tails: Sequence[EncodedProblem],
    *,
    batch_problems: int,
    progress: str,
) -> dict[str, Tensor]:
    """Scores every rationale by every metric, preset and policy.

    Args:
        student: the student.
        problems: P encoded problems with R rationales in all.
        with_tails: the same problems, encoded with `keep_tail`.
        batch_problems: problems per pass.
        progress: label of the progress bar.

    Returns:
        Name -> [R] float32, higher is better. A metric has its own name, and is negated
        where lower is better; a preset or policy has the name "weight of NAME" and gives the
        logarithm of its weight.
    """
    policies = {name: make_weigher(name) for name in POLICIES}
    presets = {name: PresetWeigher(name, preset) for name, preset in PRESETS.items()}
    statistics = {*statistics_of(METRICS.values())}
    statistics.update(name for policy in policies.values() for name in policy.statistics)
    parts: dict[str, list[Tensor]] = {}
    preset_scores: dict[str, dict[str, list[Tensor]]] = {name: {} for name in PRESETS}

    def collect(store: dict[str, list[Tensor]], name: str, values: Tensor) -> None:
        store.setdefault(name, []).append(values.float())

    for start in tqdm(range(0, len(problems), batch_problems), desc=progress, unit="batch"):
        part = slice(start, start + batch_problems)

        @cache
        def pass_over(padded: bool, keep_tail: bool, part: slice = part) -> Pass:
            chunk = (with_tails if keep_tail else problems)[part]
            layout: Layout = "padded" if padded else "tree"
            return observe(student, chunk, layout=layout, leaves=not padded, statistics=statistics)

        for name in metric_names():
            metric = get_metric(name)
            values = metric.score(pass_over(metric.needs_padded, metric.needs_padded))
            collect(parts, name, -values if metric.direction == "lower" else values)
        for name, preset in presets.items():
            pass_ = pass_over(preset.needs_padded, preset.keep_tail)
            for axis, values in preset.score(pass_).items():
                collect(preset_scores[name], axis, values)
        for name, policy in policies.items():
            collect(parts, f"weight of {name}", policy(pass_over(False, False)).weight.log())
    found = {name: torch.cat(values) for name, values in parts.items()}
    sizes = [len(problem.rationales) for problem in problems]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    for name, preset in presets.items():
        scores = {axis: torch.cat(values) for axis, values in preset_scores[name].items()}
        # One update with all scores, so that the running spread is that of the whole data.
        preset.update(scores, offsets)
        weigh = preset.weigh(scores, offsets)
        found[f"weight of {name}"] = weigh.weight.log()
    return found


def auc(
    scores: Tensor, problems: Sequence[EncodedProblem], labels: Labels, kind: str, over: str
) -> tuple[float, float]:
    """How often rationales of kind `over` score above those of kind `kind` in the same problem.

    Args:
        scores: [R] in the order of the problems' rationales.
        problems: the problems.
        labels: the kind of each rationale.
        kind: the kind that should score lower.
        over: the kind that should score higher.

    Returns:
        Mean over the problems that have both kinds, and half the width of its 95% interval.

    Raises:
        ValueError: no problem has both kinds.
    """
    shares, start = [], 0
    for problem in problems:
        kinds = [labels[problem.question_id, r.teacher] for r in problem.rationales]
        mine = scores[start : start + len(kinds)].double()
        start += len(kinds)
        high = mine[[k == over for k in kinds]]
        low = mine[[k == kind for k in kinds]]
        if len(high) and len(low):
            above = (high[:, None] > low[None, :]).double()
            shares.append(above + 0.5 * (high[:, None] == low[None, :]).double())
    if not shares:
        raise ValueError(f"expected problems with rationales of kinds {over!r} and {kind!r}")
    means = torch.stack([share.mean() for share in shares])
    half = 1.96 * float(means.std(correction=0)) / len(means) ** 0.5
    return float(means.mean()), half


def zoo_labels(problems: Sequence[Problem]) -> dict[tuple[str, str], str]:
    """The kind of each rationale of a zoo: "right", or the name of a teacher who makes errors."""
    return {
        (problem.question_id, r.teacher): "right" if r.teacher in zoo.RIGHT else r.teacher
        for problem in problems
        for r in problem.rationales
    }


def plant(
    problems: Sequence[Problem], kind: str, seed: int, limit: int
) -> tuple[list[Problem], dict[tuple[str, str], str]]:
    """Plants an error in one rationale of each problem; its teacher is drawn at random.

    Leaves out problems with fewer than three rationales, with a rationale that does not end in the
    gold answer, or in which no error can be planted.

    Args:
        problems: real problems.
        kind: kind of error, a key of `planted.PLANTS`.
        seed: sets which problems, teachers and errors are drawn.
        limit: most problems to return.

    Returns:
        The problems, each with one planted error, and the kind of each rationale.
    """
    rng = random.Random(f"{kind} {seed}")
    found: list[Problem] = []
    labels: dict[tuple[str, str], str] = {}
    for problem in rng.sample(list(problems), len(problems)):
        texts = [str(r.completion) for r in problem.rationales]
        domain, gold = problem.domain, problem.answer
        if gold is None or len(texts) < 3:
            continue
        if not all(domain.matches(domain.extract(text), gold) for text in texts):
            continue
        where = rng.randrange(len(texts))
        spoilt = PLANTS[kind](texts[where], gold, rng)
        if spoilt is None:
            continue
        rationales = list(problem.rationales)
        old = rationales[where]
        rationales[where] = type(old)(old.teacher, spoilt, old.line)
        found.append(replace(problem, rationales=tuple(rationales)))
        for i, rationale in enumerate(rationales):
            labels[problem.question_id, rationale.teacher] = kind if i == where else "right"
        if len(found) == limit:
            break
    return found, labels


Table = dict[str, dict[str, tuple[float, float]]]
"""Score -> column -> (AUC, half the width of its 95% interval)."""


def study(
    student: Student,
    processing_class: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    labels: Labels,
    *,
    batch_problems: int = 16,
    progress: str = "scores",
) -> Table:
    """Computes every score on one set of labelled problems.

    Returns:
        For each score, the AUC of each kind of error in `labels`. If the data has the zoo's good
        and verbose teachers, also how often good scores above verbose.
    """
    encoded, with_tails = (
        encode_problems(problems, processing_class, max_length=1024, keep_tail=keep)
        for keep in (False, True)
    )
    scores = score_everything(
        student,
        encoded,
        with_tails,
        batch_problems=batch_problems,
        progress=progress,
    )
    kinds = sorted(set(labels.values()) - {"right"})
    names = {(p.question_id, r.teacher): r.teacher for p in problems for r in p.rationales}
    table: Table = {}
    for name, values in scores.items():
        table[name] = {kind: auc(values, encoded, labels, kind, "right") for kind in kinds}
        if {"good", "verbose"} <= set(names.values()):
            table[name]["verbose"] = auc(values, encoded, names, "verbose", "good")
    return table


def zoo_study(seeds: Sequence[int], problems: int, cache: Path) -> Table:
    """Scores five teachers of the zoo with students at three stages, averaged over seeds."""
    tables: dict[str, list[Table]] = {}
    for seed in seeds:
        data = load_problems(zoo.make_rows(ZOO_TEACHERS, problems, seed))
        for stage in STAGES:
            model, tokenizer = load_zoo_student(stage, seed, cache=cache)
            student = Student.of(model, tokenizer)
            found = study(student, tokenizer, data, zoo_labels(data), progress=f"{stage} {seed}")
            tables.setdefault(stage, []).append(found)
    merged: Table = {}
    for stage, of_seeds in tables.items():
        for name in of_seeds[0]:
            for column in of_seeds[0][name]:
                cells = [table[name][column] for table in of_seeds]
                mean = sum(cell[0] for cell in cells) / len(cells)
                half = sum(cell[1] ** 2 for cell in cells) ** 0.5 / len(cells)
                merged.setdefault(name, {})[f"{stage}: {column}"] = (mean, half)
    return merged


def weight_study(seeds: Sequence[int], problems: int, cache: Path) -> Table:
    """The share of the weight on right rationales in zoos A and B, without training.

    The students have seed 0 and three stages; `seeds` sets stories and errors. Intervals are over
    problems.
    """
    merged: Table = {}
    for stage in STAGES:
        model, tokenizer = load_zoo_student(stage, 0, cache=cache)
        student = Student.of(model, tokenizer)
        for the_zoo in zoo.ZOOS.values():
            data = [
                problem
                for seed in seeds
                for problem in load_problems(the_zoo.sized(problems, 0).rows(seed))
            ]
            encoded = encode_problems(data, tokenizer, max_length=1024)
            progress = f"zoo {the_zoo.name}, {stage}"
            # The zoo's tokenizer has no chat template, so there are no tails.
            scores = score_everything(
                student, encoded, encoded, batch_problems=16, progress=progress
            )
            right = torch.tensor([[t in zoo.RIGHT for t in the_zoo.teachers]]).double()
            for name, values in scores.items():
                if name.startswith("weight of "):
                    weight = values.double().exp().view(-1, len(the_zoo.teachers))
                    shares = (weight * right).sum(1) / weight.sum(1)
                    half = 1.96 * float(shares.std()) / len(shares) ** 0.5
                    cell = (float(shares.mean()), half)
                    merged.setdefault(name.removeprefix("weight of "), {})[progress] = cell
    return merged


def svamp_study(data: Path, model_name: str, seeds: Sequence[int], problems: int) -> Table:
    """Scores real rationales with planted errors of every kind, with a real student."""
    pool = load_problems(data)
    model, processing_class = load_student(model_name)
    student = Student.of(model, processing_class)
    merged: Table = {}
    for kind in PLANTS:
        chosen: list[Problem] = []
        labels: dict[tuple[str, str], str] = {}
        for seed in seeds:
            part, kinds = plant(pool, kind, seed, problems)
            for problem in part:  # a problem may be drawn under several seeds
                name = f"{seed}/{problem.question_id}"
                chosen.append(replace(problem, question_id=name))
                for r in problem.rationales:
                    labels[name, r.teacher] = kinds[problem.question_id, r.teacher]
        if not chosen:
            raise ValueError(
                f"{data}: expected problems with three or more rationales, all right, in which an "
                f"error of kind {kind!r} can be planted, got none"
            )
        found = study(
            student, processing_class, chosen, labels, batch_problems=2, progress=f"SVAMP {kind}"
        )
        for name, cells in found.items():
            merged.setdefault(name, {}).update(cells)
    return merged


def as_markdown(table: Table) -> str:
    """The table in Markdown: one row per score, "AUC ± half interval" in each cell."""
    columns = list(next(iter(table.values())))
    lines = ["| score | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in table.items():
        row = " | ".join(f"{cells[c][0]:.2f} ± {cells[c][1]:.2f}" for c in columns)
        lines.append(f"| {name} | {row} |")
    return "\n".join(lines) + "\n"


def draw(table: Table, title: str, measure: str) -> Figure:
    """Draws the table: one row per score, one column per error, coloured by AUC."""
    from matplotlib.figure import Figure

    names, columns = list(table), list(next(iter(table.values())))
    values = [[table[name][column][0] for column in columns] for name in names]
    figure = Figure(figsize=(3.2 + 0.85 * len(columns), 1.8 + 0.34 * len(names)), dpi=130)
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label=measure, fraction=0.04)
    return figure
