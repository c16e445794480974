"""Reads the files of a run folder, and analyses single problems with its student."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compact.data import Problem, load_problems
from compact.data.rows import HUB
from compact.files import ANY_NUMBER, SHARE, check_shape, json_lines, read_json
from compact.metrics import COMPATIBILITY, VALIDITY
from compact.passes.encode import encode_problems
from compact.passes.layout import choose_layout
from compact.report.explain import ExplainedProblem, explain_problem
from compact.settings import MAX_LENGTH
from compact.strategies import STRATEGIES, Strategy
from compact.strategies.building import Builder
from compact.student import Student, load_model
from compact.trainer.card import is_of
from compact.trainer.runlog import read_scores

# What the page reads of the files of a run.
_INFO = {
    "settings?": dict,
    "student?": (str, None),
    "data?": (str, None),
    "strategy?": (str, None),
    "versions?": {str: str},
}
_COMPARISON = {
    "arms": [
        {
            "name": str,
            "seeds": [int],
            "values": [SHARE],
            **dict.fromkeys(("mean", "right_weight"), SHARE),
            **dict.fromkeys(("ci_low", "ci_high"), (SHARE, None)),
            **dict.fromkeys(("right_weight_low", "right_weight_high"), (SHARE, None)),
            "weights?": {str: SHARE},
            "tokens": int,
            "steps": int,
            "gain?": ANY_NUMBER,
            **dict.fromkeys(("gain_low?", "gain_high?"), (ANY_NUMBER, None)),
        }
    ],
    "metric?": str,
    "token_budget?": int,
    "settings?": dict,
}
_READING = {
    "max_length?": int,
    "leaf_budget?": ANY_NUMBER,
    "model_init_kwargs?": ({"dtype?": (str, None)}, None),
}
_BUILT = {"question_id": str, "completions": [(str, None)]}
_DRIFT = {
    "data": str,
    **dict.fromkeys(("base_perplexity", "student_perplexity", "kl"), ANY_NUMBER),
}
_EVALUATION = {
    **dict.fromkeys(("accuracy", "ci_low", "ci_high"), SHARE),
    "correct": int,
    "items": int,
    "forgetting?": {
        "tasks?": {
            str: dict.fromkeys(
                ("base_accuracy", "student_accuracy", "drop", "drop_low", "drop_high"), ANY_NUMBER
            )
        },
        **dict.fromkeys(("text?", "answers?"), _DRIFT),
        "layers?": {"moved": [ANY_NUMBER], "states": {str: [ANY_NUMBER]}},
    },
}


@dataclass
class Run:
    """The contents of a run folder; any part except the folder may be absent.

    Attributes:
        folder: the run folder.
        info: run.json ({} if absent).
        scores: columns of the score log as arrays, in order of steps ({} if absent).
        logs: the log history of transformers.
        evaluations: name and summary of each complete `compact evaluate`, oldest first.
        arms: compare.json ({} if absent).
        explained: the problems that the page shows token by token.
        notes: sentences that say what the page leaves out and why.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    arms: dict[str, Any] = field(default_factory=dict)
    explained: list[ExplainedProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def teachers(self) -> list[str]:
        """Teachers in order of first appearance; the index of a teacher gives its colour."""
        return list(dict.fromkeys(self.scores["teacher"].tolist())) if self.scores else []

    @cached_property
    def rows_of(self) -> dict[str, np.ndarray]:
        """Teacher -> the rows of the score log that are its own."""
        return {name: np.flatnonzero(self.scores["teacher"] == name) for name in self.teachers}

    @cached_property
    def starts(self) -> np.ndarray:
        """`visits` of the score log."""
        return visits(self.scores)

    @cached_property
    def effective(self) -> np.ndarray:
        """`effective_teachers` of the score log."""
        return effective_teachers(self.scores["weight"], self.starts)

    @cached_property
    def own(self) -> list[tuple[str, dict[str, Any]]]:
        """The evaluations that are of the run's student, and not of its base or another model."""
        student = student_folder(self.folder)
        return [(n, s) for n, s in self.evaluations if student is not None and is_of(s, student)]


def read_run(folder: str | Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds neither a score log nor compare.json, or a file is not valid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    run = Run(folder)
    if (folder / "run.json").exists():
        run.info = read_json(folder / "run.json", _INFO)
    if (folder / "scores").is_dir():
        table = read_scores(folder)
        run.scores = {n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names}
    if (folder / "compare.json").exists():
        run.arms = read_json(folder / "compare.json", _COMPARISON)
    if not run.arms and not len(run.scores.get("step", ())):
        raise ValueError(f"{folder}: expected the score log of a run (scores/) or compare.json")
    if not len(run.scores.get("step", ())):
        run.scores = {}
    states = [folder / "trainer_state.json"]
    states += [checkpoint / "trainer_state.json" for checkpoint in _checkpoints(folder)]
    state = next((path for path in states if path.exists()), None)
    run.logs = read_json(state, {"log_history": [dict]})["log_history"] if state else []
    for path in sorted(folder.glob("*.summary.json"), key=lambda p: p.stat().st_mtime):
        summary = read_json(path)
        if summary.get("status") == "complete" and "accuracy" in summary:
            check_shape(summary, _EVALUATION, str(path))
            run.evaluations.append((path.name.removesuffix(".summary.json"), summary))
    return run


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [(int(p.name[11:]), p) for p in run.glob("checkpoint-*") if p.name[11:].isdecimal()]
    return [path for _, path in sorted(found, reverse=True)]


def visits(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Returns [visits + 1]: the row of the log where each visit of a problem begins, and the end.

    A visit is one use of a problem: consecutive rows with the same step and question_id. A teacher
    has one row in it: a problem of one rationale may be used twice in a step (co-supervised).
    """
    step, question, teacher = scores["step"], scores["question_id"], scores["teacher"]
    new = (step[1:] != step[:-1]) | (question[1:] != question[:-1]) | (teacher[1:] == teacher[:-1])
    return np.concatenate([[0], np.flatnonzero(new) + 1, [len(step)]])


def effective_teachers(weight: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns exp(entropy of the weights) of each visit: 1 = one teacher, K = uniform weights.

    Weights are divided by their sum in the visit; NaN if all are 0 (the problem was left out).
    """
    total = np.add.reduceat(weight, starts[:-1])
    share = weight / np.where(total > 0, total, 1.0).repeat(np.diff(starts))
    logs = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    found: np.ndarray = np.where(total > 0, np.exp(-np.add.reduceat(logs, starts[:-1])), np.nan)
    return found


def logged(run: Run, name: str) -> list[tuple[float, float]]:
    """Returns (step, value) of a quantity in the trainer's log; only finite values."""
    found = [(float(e["step"]), e[name]) for e in run.logs if name in e and "step" in e]
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def last_visit(run: Run, question_id: str) -> dict[str, dict[str, float]]:
    """Returns teacher -> weight, validity and z-scores, from the last step that had the problem.

    It is {} if no step had it. A value that is not in the log is NaN.
    """
    scores = run.scores
    if not scores:
        return {}
    mine = np.flatnonzero(scores["question_id"] == question_id)
    if not len(mine):
        return {}
    mine = mine[scores["step"][mine] == scores["step"][mine].max()]
    columns = ("weight", VALIDITY, *(f"z_{axis}" for axis in COMPATIBILITY))
    return {scores["teacher"][i]: {c: float(scores[c][i]) for c in columns} for i in mine}


def choose_problems(run: Run, count: int, known: Container[str]) -> list[str]:
    """Returns up to `count` of the known question ids, evenly spaced by their effective teachers.

    The first has the most concentrated weights at its last visit, the last the most even ones.
    Problems that were left out are chosen only if all were.
    """
    logged = zip(run.scores["question_id"][run.starts[:-1]], run.effective, strict=True)
    last = {q: e for q, e in logged if q in known}
    weighed = {q: e for q, e in last.items() if not math.isnan(e)} or last
    ordered = sorted(weighed, key=lambda q: (weighed[q], q))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round())
    return [ordered[int(i)] for i in places]


def student_folder(run: Path) -> Path | None:
    """Returns the run folder or else the newest checkpoint in it that holds a student, or None."""
    for folder in (run, *_checkpoints(run)):
        if any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
            return folder
    return None


def as_trained(run: Run, problems: Sequence[Problem]) -> list[Problem]:
    """Returns problems with the rationales that a `Builder` wrote anew before training, if any."""
    name = run.info.get("strategy") or ""
    rows = run.folder / f"{name}.jsonl"
    if not issubclass(STRATEGIES.get(name, Strategy), Builder) or not rows.exists():
        return list(problems)
    written: dict[str, list[str | None]] = {}
    for where, _, row in json_lines(rows):
        check_shape(row, _BUILT, where)
        written[row["question_id"]] = row["completions"]
    found = []
    for problem in problems:
        old, new = problem.rationales, written.get(problem.question_id, [])
        if len(old) == len(new):  # else the data were edited
            pairs = zip(old, new, strict=True)
            texts = (r if text is None else replace(r, completion=text) for r, text in pairs)
            problem = replace(problem, rationales=tuple(texts))
        found.append(problem)
    return found


def look_into(
    run: Run, *, problems: int, question_ids: Sequence[str] | None = None, data: str | None = None
) -> None:
    """Explains some problems for the page, or adds a note that says why this is not possible.

    Args:
        run: gets the result in its `explained` or `notes`.
        problems: how many problems to choose if `question_ids` is empty.
        question_ids: the problems to explain.
        data: the file of rationales; None for the data of the run.

    Raises:
        ValueError: `question_ids` are given and cannot be explained, or are not in the data; or
            `data` are given, and no problem is to be shown.
        OSError: there is no such file `data`.
    """
    if not question_ids and (problems == 0 or not run.scores):
        if data is not None:
            why = "--problems is 0" if problems == 0 else f"{run.folder} has no score log"
            raise ValueError(f"--data must be used with problems to show, and {why}")
        return
    obstacle = _explain(run, problems, question_ids, data)
    if obstacle is None:
        return
    if question_ids:
        raise ValueError(f"{run.folder}: {obstacle}")
    run.notes.append(f"No problems are shown: {obstacle}.")


def _explain(
    run: Run, problems: int, question_ids: Sequence[str] | None, asked: str | None
) -> str | None:
    """Does what `look_into` says; returns why it cannot, None if it has done it."""
    data = asked or run.info.get("data")
    if data is None:
        return "run.json does not name the data; name it with --data"
    if not str(data).startswith(HUB) and not Path(data).exists():
        if data == asked:
            raise FileNotFoundError(f"{data}: no such file")
        return f"{data}: no such file; name the data with --data"
    folder = student_folder(run.folder)
    if folder is None:
        return "the run has not saved a student yet"
    known = {problem.question_id: problem for problem in load_problems(data)}
    absent = next((q for q in question_ids or () if q not in known), None)
    if absent is not None:
        raise ValueError(f"{data}: holds no question_id {absent!r}")
    ids = question_ids or choose_problems(run, problems, known)
    if not ids:
        return f"{data} holds none of the problems that the run has logged"
    settings = run.info.get("settings", {})
    check_shape(settings, _READING, f"{run.folder / 'run.json'}: settings")
    dtype = (settings.get("model_init_kwargs") or {}).get("dtype")
    try:
        model, processing_class = load_model(str(folder), dtype=dtype)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        # torch raises a RuntimeError where memory is short.
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"the student cannot be loaded ({reason}); --problems 0 leaves them out"
    chosen = [known[question_id] for question_id in ids]
    trained = as_trained(run, chosen)
    if trained != chosen:
        run.notes.append(
            f"The problems have the rationales that {run.info['strategy']} wrote for them."
        )
    limits: dict[str, Any] = {
        "max_length": settings.get("max_length", MAX_LENGTH),
        # Runs before the leaf budget asked after every step.
        "leaf_budget": settings.get("leaf_budget", math.inf),
    }
    student = Student.of(model)
    layout = choose_layout(student, "auto", limits["max_length"])[0]
    encoded = encode_problems(trained, processing_class, **limits)
    bar = tqdm(encoded, desc="analysing problems", unit="problem")
    run.explained = [explain_problem(student, processing_class, p, layout) for p in bar]
    return None
