"""Computes the values that the report's tables, tiles and problem sections show."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from compact.evaluation.forgetting import ANSWERS, TEXT
from compact.metrics import AXES
from compact.report.charts import (
    Interval,
    Node,
    Series,
    consensus_chart,
    interval_chart,
    line_chart,
)
from compact.report.explain import ExplainedProblem, ExplainedRationale
from compact.report.run import Run, last_visit, logged
from compact.text.equations import equations


def teacher_table(run: Run) -> list[dict[str, Any]]:
    """Returns a row per teacher: rationales, mean length, weight and scores, share of first places.

    Teachers that tie for the greatest weight of a visit share the first place.
    """
    scores = run.scores
    starts = run.starts
    best = np.zeros(len(scores["step"]))
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        weight = scores["weight"][a:b]
        if weight.any():  # else the problem was left out
            best[a:b] = np.isclose(weight, weight.max(), rtol=1e-6)
            best[a:b] /= best[a:b].sum()
    rows = []
    for colour, (teacher, mine) in enumerate(run.rows_of.items()):
        row = {
            "teacher": teacher,
            "colour": colour,
            "rationales": len(set(scores["question_id"][mine].tolist())),
            "tokens": float(scores["tokens"][mine].mean()),
            "weight": float(scores["weight"][mine].mean()),
            "first": float(best[mine].mean()),
        }
        for name in ("nll", *AXES):
            values = scores[name][mine]
            row[name] = float(np.nanmean(values)) if not np.isnan(values).all() else None
        rows.append(row)
    return rows


def forgetting_rows(run: Run) -> list[dict[str, Any]]:
    """Returns the forgetting that each evaluation measured, one row per text file or task."""
    rows = []
    for name, summary in run.evaluations:
        found = summary.get("forgetting", {})
        for text in (found[name] for name in (TEXT, ANSWERS) if name in found):
            rows.append(
                {
                    "evaluation": name,
                    "data": text["data"],
                    "measure": "perplexity",
                    "base": f"{text['base_perplexity']:.2f}",
                    "student": f"{text['student_perplexity']:.2f}",
                    "change": f"KL {text['kl']:.4f} nats per token",
                }
            )
        for data, task in found.get("tasks", {}).items():
            rows.append(
                {
                    "evaluation": name,
                    "data": data,
                    "measure": "accuracy",
                    "base": f"{task['base_accuracy']:.3f}",
                    "student": f"{task['student_accuracy']:.3f}",
                    "change": f"drop {task['drop']:+.3f} "
                    f"({task['drop_low']:+.3f} to {task['drop_high']:+.3f})",
                }
            )
    return rows


def layer_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns (heading, explanation, chart) of what training changed, layer by layer.

    They show the newest evaluation that measured it.
    """
    found = [s.get("forgetting", {}).get("layers") for _, s in run.evaluations]
    newest = next((layers for layers in reversed(found) if layers), None)
    if newest is None:
        return []
    names = {TEXT: "retained texts", ANSWERS: "own answers to the questions"}
    lines = [
        Series(names[name], i, list(enumerate(newest["states"][name])))
        for i, name in enumerate(names)
        if newest["states"].get(name)
    ]
    moved = Series("weights", 0, list(enumerate(newest["moved"], start=1)))
    charts = []
    if lines:
        legend = " and ".join(f"{s.name} ({'blue' if s.colour == 0 else 'orange'})" for s in lines)
        chart = line_chart(
            "Similarity of hidden states before and after training, by layer",
            lines,
            x_label="layer (0: embeddings)",
            y_range=(None, 1.0),
        )
        charts.append(
            (
                "Hidden states",
                f"Linear CKA of the states before and after training; 1: unchanged. On {legend}.",
                chart,
            )
        )
    if moved.points:
        chart = line_chart("Change of the weights by layer", [moved], x_label="layer")
        text = "Norm of the change over the norm of the weights, of each decoder layer."
        charts.append(("Weights", text, chart))
    return charts


def token_spans(rationale: ExplainedRationale, scale: float) -> list[dict[str, Any]]:
    """Groups the tokens of a rationale by step.

    Args:
        rationale: the rationale.
        scale: gain in nats at which the colour is strongest.

    Returns:
        Groups with `step` (index or None) and `tokens` as (text, tint in [-1, 1], gain in nats).
    """
    groups: list[dict[str, Any]] = []
    for token in rationale.tokens:
        step = token.step if token.step >= 0 else None
        if not groups or groups[-1]["step"] != step:
            groups.append({"step": step, "tokens": []})
        tint = max(-1.0, min(1.0, token.gain / scale))
        groups[-1]["tokens"].append((token.text, tint, token.gain))
    return groups


def problem_view(run: Run, problem: ExplainedProblem, colours: dict[str, int]) -> dict[str, Any]:
    """Returns the values that the page shows for a problem.

    Without a gold answer, `path` and every rationale's `right` are None.
    """
    sizes = [abs(t.gain) for r in problem.rationales for t in r.tokens]
    scale = float(np.quantile(sizes, 0.95)) or 1.0
    visit = last_visit(run, problem.question_id)
    lines: list[Series] = []
    rationales: list[dict[str, Any]] = []
    for rationale in problem.rationales:
        colour = colours[rationale.teacher]
        levels = [] if problem.start is None else [(0.0, problem.start)]
        levels += [(i + 1.0, s.level) for i, s in enumerate(rationale.steps) if s.level is not None]
        if levels:
            lines.append(Series(rationale.teacher, colour, levels))
        jumps = [(i + 1.0, s.level or 0.0) for i, s in enumerate(rationale.steps) if s.epiphany]
        if jumps:
            lines.append(Series(f"{rationale.teacher}: epiphany", colour, jumps, "dots"))
        rationales.append(
            {
                "teacher": rationale.teacher,
                "colour": colour,
                "answer": rationale.answer,
                "right": None if problem.gold is None else rationale.answer == problem.gold,
                "visit": visit.get(rationale.teacher),
                "groups": token_spans(rationale, scale),
                "steps": rationale.steps,
            }
        )
    rationales.sort(key=lambda r: -(r["visit"] or {"weight": 0.0})["weight"])
    path = None
    if lines:
        path = line_chart(
            "Log-likelihood of the gold answer after each step",
            lines,
            x_label="steps read",
            height=220.0,
        )
    nodes = [
        Node(row, column, s.support, s.mainstream, step_label(s.text), s.text, s.epiphany)
        for row, rationale in enumerate(problem.rationales)
        for column, s in enumerate(rationale.steps)
    ]
    graph = consensus_chart(
        "Consensus graph of the steps",
        [(r.teacher, colours[r.teacher]) for r in problem.rationales],
        nodes,
        problem.matches,
    )
    return {"problem": problem, "rationales": rationales, "path": path, "graph": graph}


def step_label(text: str) -> str:
    """Returns the label of a node in the graph: the step's last equation, else its first words."""
    found = equations(text)
    return found[-1].key if found else " ".join(text.split()[:3])


def tiles(run: Run) -> list[tuple[str, str]]:
    """Returns (value, description) of the key figures at the top of the page."""
    found = []
    if run.scores:
        scores = run.scores
        effective = run.effective[~np.isnan(run.effective)]  # without problems that were left out
        found += [
            (f"{int(scores['step'].max()):,}", "optimizer steps"),
            (f"{len(set(scores['question_id'].tolist())):,}", "problems"),
            (f"{len(run.teachers)}", "teachers"),
            (f"{float(effective.mean()) if len(effective) else 0.0:.2f}", "effective teachers"),
        ]
    loss = logged(run, "loss")
    if len(loss) > 1:
        tenth = max(1, len(loss) // 10)
        first = sum(v for _, v in loss[:tenth]) / tenth
        last = sum(v for _, v in loss[-tenth:]) / tenth
        found.append((f"{last:.3f}", f"loss at the end, {first:.3f} at first"))
    if run.own:
        name, summary = run.own[-1]
        found.append((f"{summary['accuracy']:.1%}", f"accuracy ({name})"))
    if run.arms.get("arms"):
        arms = run.arms["arms"]
        best = max(arms, key=lambda a: a["mean"])
        found += [
            (f"{len(arms)}", "arms"),
            (f"{max(len(arm['seeds']) for arm in arms)}", "seeds per arm"),
            (f"{best['mean']:.3f}", f"{run.arms.get('metric', 'accuracy')} of {best['name']}"),
        ]
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns (name, value) of the settings and metadata of the run."""
    info, settings = run.info, run.info.get("settings", {})
    found = [
        ("Student", info.get("student")),
        ("Data", info.get("data")),
        ("Weights", info.get("weigher")),
        ("Strategy", info.get("strategy")),
        ("Options of the strategy", settings.get("strategy_options")),
        ("Learning rate", settings.get("learning_rate")),
        ("Epochs", settings.get("num_train_epochs")),
        ("Seed", settings.get("seed")),
        ("Layout", info.get("layout", info.get("packing"))),
        ("Started", info.get("started")),
        ("Status", info.get("status")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in info.get("versions", {}).items())),
        ("Command", info.get("command")),
        ("Compared on", run.arms.get("data")),
        *(
            (f"Compared with {name}", value)
            for name, value in run.arms.get("settings", {}).items()
            if "\n" not in str(value)
        ),
        ("Comparison", run.arms.get("command")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def arm_view(run: Run) -> dict[str, Any] | None:
    """Returns the table and charts of the arms of compare.json, or None if it is absent.

    An arm with one seed, or with equal ones, has no interval: its ends are None.
    """
    if not run.arms.get("arms"):
        return None
    arms = []
    for arm in run.arms["arms"]:
        ends = [name for name in arm if name.endswith(("_low", "_high"))]
        arms.append(arm | (dict.fromkeys(ends) if len(arm["seeds"]) == 1 else {}))
    metric = run.arms.get("metric", "accuracy")

    def row(arm: dict[str, Any], name: str, ends: tuple[str, str], colour: int) -> Interval:
        low, high = (arm[name] if arm[end] is None else arm[end] for end in ends)
        points = arm["values"] if name == "mean" else ()
        return Interval(arm["name"], colour, arm[name], low, high, points=points)

    return {
        "arms": arms,
        "chart": interval_chart(
            f"{metric} of each arm",
            [row(arm, "mean", ("ci_low", "ci_high"), 0) for arm in arms],
            x_label=f"{metric}, 95% interval",
        ),
        "weights": interval_chart(
            "Weight on right rationales",
            [
                row(arm, "right_weight", ("right_weight_low", "right_weight_high"), 2)
                for arm in arms
            ],
            x_label="weight, 95% interval",
            x_range=(0.0, 1.0),
        ),
        "teachers": sorted({teacher for arm in arms for teacher in arm.get("weights", {})}),
        "metric": metric,
        "best": max(arms, key=lambda a: a["mean"])["name"],
        "about": run.arms,
    }
