"""The report's charts of weights, scores and learning over the steps of a run."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from compact.metrics import AXES, VALIDITY
from compact.report.charts import Interval, Series, interval_chart, line_chart
from compact.report.run import Run, logged

BINS = 40
"""Points of a curve over the steps of a run."""
AXIS_TEXT = {
    "validity": "How likely is it to be right? The weight is multiplied by it.",
    "adaptability": "Does it lead the student to the gold answer? Higher raises the weight.",
    "consensus": "Do its steps agree with the other teachers'? Higher raises the weight.",
    "difficulty": "How hard is it for the student to say? Higher lowers the weight.",
}


def binned(step: np.ndarray, value: np.ndarray) -> list[tuple[float, float]]:
    """Returns (mean step, mean of `value`) for each of at most `BINS` equal ranges of steps."""
    keep = ~np.isnan(value)
    step, value = step[keep], value[keep]
    if not len(step):
        return []
    edges = np.linspace(step.min(), step.max() + 1, BINS + 1)
    place = np.digitize(step, edges) - 1
    count = np.bincount(place, minlength=BINS)
    used = count > 0
    mean = np.bincount(place, value, BINS)[used] / count[used]
    at = np.bincount(place, step, BINS)[used] / count[used]
    return list(zip(at.tolist(), mean.tolist(), strict=True))


def weight_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns (heading, explanation, chart) of the weights over time."""
    scores, starts = run.scores, run.starts
    lines = []
    for colour, (teacher, mine) in enumerate(run.rows_of.items()):
        points = binned(scores["step"][mine], scores["weight"][mine])
        lines.append(Series(teacher, colour, points))
    sizes = np.diff(starts)
    even = float((1 / sizes).mean())
    top = max(y for s in lines for _, y in s.points)
    most = float(sizes.mean())
    over_steps = binned(scores["step"][starts[:-1]], run.effective)
    charts = [
        (
            "Mean weight of each teacher",
            "A teacher's weight within a problem, averaged over the problems of a step.",
            line_chart(
                "Mean weight of each teacher over the steps",
                lines,
                x_label="optimizer step",
                y_range=(0.0, min(1.05, max(top, even) * 1.15)),
                reference=(even, "uniform"),
            ),
        ),
    ]
    if over_steps:  # else every problem was left out
        text = (
            "exp(entropy) of a problem's weights: 1 means that one teacher has all the weight, "
            f"{most:.3g} means that all teachers have the same weight."
        )
        chart = line_chart(
            "Effective number of teachers over the steps",
            [Series("effective teachers", 0, over_steps)],
            x_label="optimizer step",
            y_range=(min(1.0, *(y for _, y in over_steps)) - 0.05, most * 1.08),
            reference=(most, "uniform"),
        )
        charts.append(("Effective number of teachers", text, chart))
    return charts


def score_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns charts of how each score and the weight are distributed, one row per teacher."""
    charts = []
    for axis in AXES:
        standard = axis != VALIDITY and not np.isnan(run.scores[f"z_{axis}"]).all()
        rows = spread(run, f"z_{axis}" if standard else axis)
        if rows:
            chart = interval_chart(
                f"Distribution of {axis} by teacher",
                rows,
                x_label=f"{axis}, standardised within the problem" if standard else axis,
                reference=0.0 if standard else None,
            )
            charts.append((axis.capitalize(), AXIS_TEXT[axis], chart))
    chart = interval_chart(
        "Distribution of the weight by teacher",
        spread(run, "weight"),
        x_label="weight",
        x_range=(0.0, 1.0),
    )
    charts.append(("Weight", "The teacher's weight, computed from the scores.", chart))
    return charts


def spread(run: Run, name: str) -> list[Interval]:
    """Returns the 5, 25, 50, 75 and 95% quantiles of a score-log column, one row per teacher."""
    rows = []
    for colour, (teacher, mine) in enumerate(run.rows_of.items()):
        values = run.scores[name][mine]
        values = values[~np.isnan(values)]
        if len(values):
            low, q1, middle, q3, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            rows.append(Interval(teacher, colour, middle, low, high, (q1, q3)))
    return rows


def learning_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns the charts of loss, likelihood by teacher and accuracy."""
    charts = []
    loss = logged(run, "loss")
    if loss:
        steps, values = np.array(loss).T
        lines = [
            Series("each log line", 0, loss, "faint"),
            Series("mean", 0, binned(steps, values)),
        ]
        evaluated = logged(run, "eval_loss")
        lines += [Series("evaluation", 1, evaluated, "dots")] if evaluated else []
        text = "Training loss as logged (faint) and its mean over ranges of steps" + (
            "; dots: evaluation loss." if evaluated else "."
        )
        chart = line_chart("Loss over the steps", lines, x_label="optimizer step")
        charts.append(("Loss", text, chart))
    if run.scores:
        lines = []
        for colour, (teacher, mine) in enumerate(run.rows_of.items()):
            points = binned(run.scores["step"][mine], run.scores["nll"][mine])
            lines += [Series(teacher, colour, points)] if points else []  # none was read
    if run.scores and lines:
        chart = line_chart(
            "Negative log-likelihood of each teacher over the steps",
            lines,
            x_label="optimizer step",
        )
        text = "How well the student predicts each teacher's text: mean nats per token."
        charts.append(("Likelihood by teacher", text, chart))
    gold = logged(run, "eval_gold_logp")
    if gold:
        chart = line_chart(
            "Log-likelihood of the gold answer over the steps",
            [Series("gold answer", 2, gold)],
            x_label="optimizer step",
        )
        text = "Given only the question, on the evaluation data; nats per token, higher is better."
        charts.append(("Gold answer", text, chart))
    rows = [
        Interval(name, 0, s["accuracy"], s["ci_low"], s["ci_high"]) for name, s in run.evaluations
    ]
    if rows:
        chart = interval_chart(
            "Accuracy of each evaluation", rows, x_label="accuracy", x_range=(0.0, None)
        )
        count = ", ".join(f"{name}: {s['correct']}/{s['items']}" for name, s in run.evaluations)
        text = f"Final answers that are right, with 95% intervals. {count}."
        own = dict(run.own)
        if others := [name for name, _ in run.evaluations if name not in own]:
            text += f" Not of this student, or not known to be: {', '.join(others)}."
        charts.append(("Accuracy", text, chart))
    return charts


def method_series(run: Run) -> dict[str, list[tuple[str, list[tuple[float, float]]]]]:
    """Returns group -> (name, points) of what strategy and policy logged; see `Strategy.take_log`.

    A key of the log is "strategy/GROUP/NAME" or "strategy/NAME", which is a group of its own.
    """
    groups: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for key in dict.fromkeys(key for entry in run.logs for key in entry):
        kind, _, rest = key.partition("/")
        if kind not in ("strategy", "policy"):
            continue
        group, _, name = rest.partition("/")
        points = logged(run, key)
        if points:
            groups.setdefault(group, []).append((name or group, points))
    return groups


def method_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns a chart of each group of `method_series` that has values at several steps."""
    charts = []
    for group, found in method_series(run).items():
        if max(len(points) for _, points in found) < 2:
            continue
        lines = [Series(name, i, points) for i, (name, points) in enumerate(found)]
        chart = line_chart(f"{group} over the steps", lines, x_label="optimizer step")
        several = ", ".join(name for name, _ in found) if len(found) > 1 else "As logged."
        charts.append((group.capitalize(), several, chart))
    return charts


def method_rows(run: Run) -> list[tuple[str, float, float]]:
    """Returns (name, first value, last value) of each series of `method_series`."""
    return [
        (group if name == group else f"{group}: {name}", points[0][1], points[-1][1])
        for group, found in method_series(run).items()
        for name, points in found
    ]
