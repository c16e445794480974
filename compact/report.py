"""`compact report`: one self-contained HTML page about a run, for a browser without network."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from tqdm import tqdm

from compact.charts import (
    Interval,
    Node,
    Series,
    consensus_chart,
    interval_chart,
    line_chart,
)
from compact.data import load_problems
from compact.encode import encode_problem
from compact.explain import ExplainedProblem, ExplainedRationale, explain_problem
from compact.files import write_whole
from compact.layout import choose_layout
from compact.metrics import AXES
from compact.runlog import read_scores
from compact.student import Student, load_model

EPILOG = """example:
  compact report runs/svamp
  compact report runs/svamp --question_id svamp-00017 --out page.html
"""

COLOURS = 8
BINS = 40
"""Points of a curve over the steps of a run."""
EQUATION = re.compile(r"[\d(][\d\s.,()+*/×÷x-]*=\s*-?[\d,]*\.?\d+")


@dataclass
class Run:
    """What a run folder holds, as far as it goes.

    Attributes:
        folder: the run.
        info: run.json ({} when absent).
        scores: columns of the score log as arrays, in order of steps ({} when absent).
        logs: transformers' log history.
        evaluations: name and summary of each `compact evaluate`, oldest first.
        arms: compare.json ({} when absent).
        explained: problems looked into.
        notes: what the page leaves out, and why.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    arms: dict[str, Any] = field(default_factory=dict)
    explained: list[ExplainedProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def teachers(self) -> list[str]:
        """Teachers in order of first appearance; a teacher's place is its colour."""
        return list(dict.fromkeys(self.scores["teacher"].tolist())) if self.scores else []


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: the file is not JSON; it is named with the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON, got {error.msg}") from None


def read_run(folder: str | Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds neither a score log nor compare.json, or a file cannot be understood.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    run = Run(folder)
    if (folder / "run.json").exists():
        run.info = read_json(folder / "run.json")
    if (folder / "scores").is_dir():
        table = read_scores(folder)
        run.scores = {n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names}
    if (folder / "compare.json").exists():
        run.arms = read_json(folder / "compare.json")
    if not run.arms and not len(run.scores.get("step", ())):
        raise ValueError(f"{folder}: expected the score log of a run (scores/) or compare.json")
    if not len(run.scores.get("step", ())):
        run.scores = {}
    states = [folder / "trainer_state.json"]
    checkpoints = folder.glob("checkpoint-*/trainer_state.json")
    states += sorted(checkpoints, key=lambda p: -int(p.parent.name.rpartition("-")[2]))
    state = next((path for path in states if path.exists()), None)
    run.logs = read_json(state)["log_history"] if state else []
    for path in sorted(folder.glob("*.summary.json"), key=lambda p: p.stat().st_mtime):
        summary = read_json(path)
        if summary.get("status") == "complete":
            run.evaluations.append((path.name.removesuffix(".summary.json"), summary))
    return run


def binned(step: np.ndarray, value: np.ndarray) -> list[tuple[float, float]]:
    """Returns means of `value` over at most `BINS` equal stretches of steps, at the mean step."""
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


def visits(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Returns where each visit of a problem begins in the log, and the end: [visits + 1]."""
    step, question = scores["step"], scores["question_id"]
    new = (step[1:] != step[:-1]) | (question[1:] != question[:-1])
    return np.concatenate([[0], np.flatnonzero(new) + 1, [len(step)]])


def effective_teachers(weight: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns exp(entropy of the weights) of each visit: 1 = one teacher, K = all alike."""
    logs = np.where(weight > 0, weight * np.log(np.where(weight > 0, weight, 1.0)), 0.0)
    return np.exp(-np.add.reduceat(logs, starts[:-1]))


def teacher_table(run: Run) -> list[dict[str, Any]]:
    """Returns for each teacher its rationales, mean weight, wins and mean scores."""
    scores = run.scores
    starts = visits(scores)
    best = np.zeros(len(scores["step"]))
    for a, b in zip(starts[:-1], starts[1:], strict=True):
        weight = scores["weight"][a:b]
        best[a:b] = np.isclose(weight, weight.max(), rtol=1e-6)
        best[a:b] /= best[a:b].sum()
    rows = []
    for colour, teacher in enumerate(run.teachers):
        mine = scores["teacher"] == teacher
        row = {
            "teacher": teacher,
            "colour": colour % COLOURS,
            "rationales": len(set(scores["question_id"][mine].tolist())),
            "tokens": float(scores["tokens"][mine].mean()),
            "weight": float(scores["weight"][mine].mean()),
            "first": float(best[mine].mean()),
            "nll": float(np.nanmean(scores["nll"][mine])),
        }
        for axis in AXES:
            values = scores[axis][mine]
            row[axis] = float(np.nanmean(values)) if not np.isnan(values).all() else None
        rows.append(row)
    return rows


def weight_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns (heading, explanation, chart) of the weights over time."""
    scores, starts = run.scores, visits(run.scores)
    lines = []
    for colour, teacher in enumerate(run.teachers):
        mine = scores["teacher"] == teacher
        points = binned(scores["step"][mine], scores["weight"][mine])
        lines.append(Series(teacher, colour % COLOURS, points))
    sizes = np.diff(starts)
    even = float((1 / sizes).mean())
    top = max(y for s in lines for _, y in s.points)
    effective = effective_teachers(scores["weight"], starts)
    most = float(sizes.mean())
    return [
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
        (
            "Effective number of teachers",
            "exp(entropy) of a problem's weights: 1 follows one teacher, "
            f"{most:.3g} listens to all alike.",
            line_chart(
                "Effective number of teachers over the steps",
                [Series("effective teachers", 0, binned(scores["step"][starts[:-1]], effective))],
                x_label="optimizer step",
                y_range=(min(1.0, float(effective.min())) - 0.05, most * 1.08),
                reference=(most, "uniform"),
            ),
        ),
    ]


AXIS_TEXT = {
    "adaptability": "Does it lead the student to the gold answer? Higher raises the weight.",
    "consensus": "Do its steps agree with the other teachers'? Higher raises the weight.",
    "difficulty": "How hard is it for the student to say? Higher lowers the weight.",
}


def score_charts(run: Run) -> list[tuple[str, str, Markup]]:
    """Returns a chart of each axis and one of the weights: how they spread, teacher by teacher."""
    charts = []
    for axis in AXES:
        standard = not np.isnan(run.scores[f"z_{axis}"]).all()
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
    charts.append(("Weight", "What the scores of a problem come to together.", chart))
    return charts


def spread(run: Run, name: str) -> list[Interval]:
    """Returns median, quartiles, 5% and 95% of a column of the score log, a row a teacher."""
    rows = []
    for colour, teacher in enumerate(run.teachers):
        values = run.scores[name][run.scores["teacher"] == teacher]
        values = values[~np.isnan(values)]
        if len(values):
            low, q1, middle, q3, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
            rows.append(Interval(teacher, colour % COLOURS, middle, low, high, (q1, q3)))
    return rows


def logged(run: Run, name: str) -> list[tuple[float, float]]:
    """Returns (step, value) of a quantity in the trainer's log, finite values only."""
    found = [(float(e["step"]), e[name]) for e in run.logs if name in e and "step" in e]
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


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
        text = "Training loss as logged (faint) and its running mean" + (
            "; dots: evaluation loss." if evaluated else "."
        )
        chart = line_chart("Loss over the steps", lines, x_label="optimizer step")
        charts.append(("Loss", text, chart))
    if run.scores:
        lines = []
        for colour, teacher in enumerate(run.teachers):
            mine = run.scores["teacher"] == teacher
            points = binned(run.scores["step"][mine], run.scores["nll"][mine])
            lines.append(Series(teacher, colour % COLOURS, points))
        chart = line_chart(
            "Negative log-likelihood of each teacher over the steps",
            lines,
            x_label="optimizer step",
        )
        text = "How well the student predicts each teacher's text: mean nats a token."
        charts.append(("Likelihood by teacher", text, chart))
    gold = logged(run, "eval_gold_logp")
    if gold:
        chart = line_chart(
            "Log-likelihood of the gold answer over the steps",
            [Series("gold answer", 2, gold)],
            x_label="optimizer step",
        )
        text = "After the bare question, on the evaluation data; nats a token, higher is better."
        charts.append(("Gold answer", text, chart))
    rows = [
        Interval(name, 0, s["accuracy"], s["ci_low"], s["ci_high"]) for name, s in run.evaluations
    ]
    if rows:
        chart = interval_chart(
            "Accuracy of each evaluation", rows, x_label="accuracy", x_range=(0.0, None)
        )
        count = ", ".join(f"{name}: {s['correct']}/{s['items']}" for name, s in run.evaluations)
        charts.append(
            ("Accuracy", f"Final answers that are right, with 95% intervals. {count}.", chart)
        )
    return charts


def forgetting_rows(run: Run) -> list[dict[str, Any]]:
    """Returns what each evaluation found forgotten, a row a text set or task."""
    rows = []
    for name, summary in run.evaluations:
        found = summary.get("forgetting", {})
        if "text" in found:
            text = found["text"]
            rows.append(
                {
                    "evaluation": name,
                    "data": text["data"],
                    "measure": "perplexity",
                    "base": f"{text['base_perplexity']:.2f}",
                    "student": f"{text['student_perplexity']:.2f}",
                    "change": f"KL {text['kl']:.4f} nats a token",
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


def last_visit(run: Run, question_id: str) -> dict[str, dict[str, float]]:
    """Returns teacher -> weight and z-scores at a problem's last visit ({} if there was none)."""
    scores = run.scores
    if not scores:
        return {}
    mine = np.flatnonzero(scores["question_id"] == question_id)
    if not len(mine):
        return {}
    mine = mine[scores["step"][mine] == scores["step"][mine].max()]
    columns = ("weight", *(f"z_{axis}" for axis in AXES))
    return {scores["teacher"][i]: {c: float(scores[c][i]) for c in columns} for i in mine}


def choose_problems(run: Run, count: int) -> list[str]:
    """Returns question ids, from the most decisive weights at the last visit to the most even."""
    starts = visits(run.scores)
    effective = effective_teachers(run.scores["weight"], starts)
    last = {q: e for q, e in zip(run.scores["question_id"][starts[:-1]], effective, strict=True)}
    ordered = sorted(last, key=lambda q: (last[q], q))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round())
    return [ordered[int(i)] for i in places]


def student_folder(run: Path) -> Path | None:
    """Returns where the run keeps a student: the folder itself, or its newest checkpoint."""
    checkpoints = run.glob("checkpoint-*")
    newest = sorted(checkpoints, key=lambda p: -int(p.name.rpartition("-")[2]))
    for folder in (run, *newest):
        if any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
            return folder
    return None


def explain(run: Run, question_ids: Sequence[str], data: str) -> list[ExplainedProblem]:
    """Looks into problems with the run's student.

    Raises:
        ValueError: a question_id is not in the data, or the run has no student.
    """
    problems = {p.question_id: p for p in load_problems(data)}
    absent = [q for q in question_ids if q not in problems]
    if absent:
        raise ValueError(f"{data}: holds no question_id {absent[0]!r}")
    folder = student_folder(run.folder)
    if folder is None:
        raise ValueError(f"{run.folder}: holds no saved student to look into problems with")
    model, processing_class = load_model(str(folder))
    max_length = run.info.get("settings", {}).get("max_length", 2560)
    student = Student.of(model)
    layout = choose_layout(student, "auto", max_length)[0]
    encoded = [
        encode_problem(problems[q], processing_class, max_length=max_length) for q in question_ids
    ]
    bar = tqdm(encoded, desc="looking into problems", unit="problem")
    return [explain_problem(student, processing_class, p, layout) for p in bar]


def token_spans(rationale: ExplainedRationale, scale: float) -> list[dict[str, Any]]:
    """Groups tokens by step for the page.

    Args:
        rationale: with its tokens.
        scale: nats of gain that take the full colour.

    Returns:
        Groups with `step` (index or None), `tokens` as (text, tint), tint in [-1, 1].
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
    """Returns what the page shows of a problem."""
    sizes = [abs(t.gain) for r in problem.rationales for t in r.tokens]
    scale = float(np.quantile(sizes, 0.95)) or 1.0
    visit = last_visit(run, problem.question_id)
    lines, rationales = [], []
    for rationale in problem.rationales:
        colour = colours[rationale.teacher]
        levels = [(0.0, problem.start)]
        levels += [(i + 1.0, s.level) for i, s in enumerate(rationale.steps)]
        lines.append(Series(rationale.teacher, colour, levels))
        jumps = [(i + 1.0, s.level) for i, s in enumerate(rationale.steps) if s.epiphany]
        if jumps:
            lines.append(Series(f"{rationale.teacher}: epiphany", colour, jumps, "dots"))
        rationales.append(
            {
                "teacher": rationale.teacher,
                "colour": colour,
                "answer": rationale.answer,
                "right": rationale.answer == problem.gold,
                "visit": visit.get(rationale.teacher),
                "groups": token_spans(rationale, scale),
                "steps": rationale.steps,
            }
        )
    rationales.sort(key=lambda r: -(r["visit"] or {"weight": 0.0})["weight"])
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
    """Returns the name of a node in the graph: the step's last equation, else its first words."""
    found = EQUATION.findall(text)
    return found[-1].replace(" ", "") if found else " ".join(text.split()[:3])


def tiles(run: Run) -> list[tuple[str, str]]:
    """Returns (value, what it is) of the figures at the head of the page."""
    found = []
    if run.scores:
        scores = run.scores
        starts = visits(scores)
        found += [
            (f"{int(scores['step'].max()):,}", "optimizer steps"),
            (f"{len(set(scores['question_id'].tolist())):,}", "problems"),
            (f"{len(run.teachers)}", "teachers"),
            (
                f"{float(effective_teachers(scores['weight'], starts).mean()):.2f}",
                "effective teachers",
            ),
        ]
    loss = logged(run, "loss")
    if len(loss) > 1:
        tenth = max(1, len(loss) // 10)
        first = sum(v for _, v in loss[:tenth]) / tenth
        last = sum(v for _, v in loss[-tenth:]) / tenth
        found.append((f"{last:.3f}", f"loss at the end, {first:.3f} at first"))
    if run.evaluations:
        name, summary = run.evaluations[-1]
        found.append((f"{summary['accuracy']:.1%}", f"accuracy ({name})"))
    if run.arms.get("arms"):
        arms = run.arms["arms"]
        best = max(arms, key=lambda a: a["mean"])
        found += [
            (f"{len(arms)}", "arms"),
            (f"{max(len(arm['seeds']) for arm in arms)}", "seeds an arm"),
            (f"{best['mean']:.3f}", f"{run.arms.get('metric', 'accuracy')} of {best['name']}"),
        ]
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """Returns (name, value) of what was run."""
    info, settings = run.info, run.info.get("settings", {})
    found = [
        ("Student", info.get("student")),
        ("Data", info.get("data")),
        ("Weights", info.get("weigher")),
        ("Learning rate", settings.get("learning_rate")),
        ("Epochs", settings.get("num_train_epochs")),
        ("Seed", settings.get("seed")),
        ("Layout", info.get("packing")),
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
    """Returns table and charts of the arms of compare.json, None without one.

    An arm of one seed has no interval: its ends are None.
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


def render(run: Run) -> str:
    """Returns the page."""
    teachers = run.teachers
    teachers += [r.teacher for p in run.explained for r in p.rationales]
    colours = {name: i % COLOURS for i, name in enumerate(dict.fromkeys(teachers))}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["tint"] = tint
    return environment.get_template("report.html.j2").render(
        title=run.folder.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        tiles=tiles(run),
        facts=facts(run),
        notes=run.notes,
        colours=colours,
        teachers=teacher_table(run) if run.scores else [],
        weights=weight_charts(run) if run.scores else [],
        scores=score_charts(run) if run.scores else [],
        learning=learning_charts(run),
        forgetting=forgetting_rows(run),
        arms=arm_view(run),
        problems=[problem_view(run, p, colours) for p in run.explained],
    )


def tint(value: float) -> Markup:
    """Returns the style of a token: green for gained information, red for lost, none near 0."""
    strength = round(abs(value) * 70)
    if strength < 4:
        return Markup("")
    name = "gain" if value > 0 else "loss"
    return Markup(f' style="--t:{strength}%" class="{name}"')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact report`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="folder of a run, or of compact compare")
    parser.add_argument("--out", metavar="FILE", help="the page [RUN/report.html]")
    parser.add_argument("--problems", type=int, default=3, metavar="N", help="to look into [3]")
    parser.add_argument("--question_id", nargs="+", metavar="ID", help="look into these problems")
    parser.add_argument("--data", metavar="FILE", help="rationales [those of the run]")


def look_into(run: Run, args: argparse.Namespace) -> None:
    """Explains the problems that are asked for, or notes on the page why it cannot.

    Raises:
        ValueError: problems are asked for by name and cannot be looked into.
    """
    data = args.data or run.info.get("data")
    if not args.question_id and (args.problems == 0 or not run.scores):
        return
    if data is None:
        obstacle = "the run does not say where its data lies; name it with --data"
    elif not Path(data).exists():
        obstacle = f"{data}: no such file; name the data with --data"
    elif student_folder(run.folder) is None:
        obstacle = "the run has not saved a student yet"
    else:
        chosen = args.question_id or choose_problems(run, args.problems)
        run.explained = explain(run, chosen, data)
        return
    if args.question_id:
        raise ValueError(f"{run.folder}: {obstacle}")
    run.notes.append(f"No problems are shown: {obstacle}.")


def run(args: argparse.Namespace) -> int:
    """Runs `compact report`; returns the exit status."""
    if args.problems < 0:
        raise ValueError(f"--problems must be at least 0, got {args.problems}")
    found = read_run(args.run)
    look_into(found, args)
    out = Path(args.out) if args.out else found.folder / "report.html"
    page = render(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    for note in found.notes:
        print(note)
    print(f"{out} ({len(page) / 1024:.0f} KiB)")
    return 0
