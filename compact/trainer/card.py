"""The model card, README.md of a run: student, teachers and weights, data, scores, command.

It is drawn from the files of the run's folder. `compact evaluate` draws it again when it adds an
accuracy. A README.md without the comment at its start is somebody else's, and is kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from compact.files import check_shape, content_of_student, read_json, read_text, replace_whole
from compact.student import base_name, holds_adapter
from compact.trainer.checkpoints import UNFINISHED_MODEL
from compact.trainer.runlog import FOLDER, read_scores

logger = logging.getLogger(__name__)

NAME = "README.md"
_OURS = "<!-- compact draws this file anew with each evaluation, unless this line is deleted -->"
_LICENCES = """Before you share it, check the licences of the base model, of the questions, and of
the teachers whose rationales it learned from (the data card of `compact collect`)."""
_INFO = {
    "student": str,
    "data?": (str, None),
    "settings?": dict,
    "command?": str,
    "versions?": {str: str},
}
_SUMMARY = {"accuracy": float, "correct": int, "items": int, "ci_low": float, "ci_high": float}
_SHOWN = (
    "preset",
    "overrides",
    "strategy",
    "token_weights",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_rationales_per_problem",
    "max_length",
    "seed",
)


def write_card(folder: Path, run: Path) -> None:
    """Writes the card of a run beside a student that is being saved.

    Args:
        folder: where the student's files are. If they are moved to a folder whose README.md is
            somebody else's, no card is written. The card of a checkpoint has no table of teachers:
            the log of scores is not read as a whole over and over.
        run: the folder of the run.
    """
    model = folder.name == UNFINISHED_MODEL  # else a checkpoint
    if folder.is_dir():
        (folder / NAME).unlink(missing_ok=True)  # that of peft
        ours = _is_ours(folder.parent if model else folder)
        card = _drawn(run, folder, teachers=model) if ours else None
        if card is not None:
            (folder / NAME).write_text(card, encoding="utf-8")


def refresh_card(run: Path) -> None:
    """Draws the card of a run anew, if it has one of ours.

    Raises:
        OSError: it cannot be written.
    """
    card = _drawn(run, run) if (run / NAME).exists() and _is_ours(run) else None
    if card is not None:
        replace_whole(run / NAME, card)


def _drawn(run: Path, student_in: Path, *, teachers: bool = True) -> str | None:
    """Returns the card; None, with a warning, if a file of the run cannot be read.

    A student must be saved, and an accuracy told, whatever else lies in the folder.
    """
    try:
        return card_of(run, student_in, teachers=teachers)
    except (ValueError, OSError) as error:
        logger.warning("no model card: %s", error)
        return None


def card_of(run: Path, student_in: Path | None = None, *, teachers: bool = True) -> str:
    """Returns the card of a run's folder as Markdown with the metadata of the hub.

    Args:
        run: the folder of the run.
        student_in: the folder that holds the student's files; None: that of the run.
        teachers: whether to read the log of scores, for the table of teachers.

    Raises:
        ValueError, OSError: a file of the run cannot be read.
    """
    student_in = student_in or run
    library = "peft" if holds_adapter(student_in) else "transformers"
    info = _info(run)
    lines = [*_head(info.get("student", ""), library), _OURS, f"# {_plain(run.name)}", ""]
    lines += [_distilled(info.get("student", "")), ""]
    return "\n".join(lines + _sections(run, student_in, info, teachers=teachers))


def exported_card(name: str, adapter: str | None, title: str) -> str:
    """Returns the card of an exported student: that of its run, if it has one, and what to check.

    Args:
        name: the student, as `export_student` gets it.
        adapter: folder of the adapter that was merged, if it was given.
        title: of the card.

    Raises:
        ValueError, OSError: a file of the run cannot be read.
    """
    own = Path(adapter or name)
    run = next((each for each in (own, own.parent) if (each / "run.json").exists()), None)
    merged = adapter is not None or holds_adapter(name)
    base = name if adapter is not None else base_name(name)
    info = {} if run is None else _info(run)
    student = info.get("student", base)
    lines = [*_head(student, "transformers"), f"# {_plain(title)}", ""]
    lines += [f"Exported from {_plain(student)}." if run is None else _distilled(student)]
    lines += ["Its adapter is merged into the weights." if merged else "It has no adapter.", ""]
    lines += [] if run is None else _sections(run, own, info, teachers=run == own)
    return "\n".join([*lines, _LICENCES, ""])


def _info(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    return read_json(path, _INFO) if path.exists() else {}


def _head(student: str, library: str) -> list[str]:
    """The metadata of the hub."""
    lines = ["---", *(["base_model: " + json.dumps(student)] if _on_hub(student) else [])]
    lines += [f"library_name: {library}", "pipeline_tag: text-generation"]
    return [*lines, "tags:", "- compact", "- distillation", "---"]


def _distilled(student: str) -> str:
    return (
        f"A student distilled from the rationales of several teachers: {_plain(student)}, trained "
        "with COMPACT (arXiv 2601.13992), which weighs each rationale problem by problem."
    )


def _sections(run: Path, student: Path, info: Mapping[str, Any], *, teachers: bool) -> list[str]:
    """What the files of a run say about the student in a folder."""
    lines = []
    for title, part in (
        ("Teachers", _teachers(run) if teachers else []),
        ("Data", [f"Rationales: {_plain(info['data'])}"] if info.get("data") else []),
        ("Scores", _scores(run, student)),
        ("Training", _training(info)),
    ):
        lines += [f"## {title}", "", *part, ""] if part else []
    return lines


def is_of(summary: Mapping[str, Any], student: Path) -> bool:
    """Whether a summary of `compact evaluate` is of the student in a folder.

    It is not if it is of another model, of other weights, or of a model behind a server, whose
    weights are not known.
    """
    settings = summary.get("settings")
    if not isinstance(settings, dict) or "weights" not in settings:
        return False
    onto = str(settings.get("model")) if settings.get("adapter") else None
    return bool(settings["weights"] == content_of_student(onto, student))


def _is_ours(folder: Path) -> bool:
    """Whether the README.md of a folder is one of ours, or absent."""
    path = folder / NAME
    try:
        return not path.exists() or _OURS in read_text(path)
    except (ValueError, OSError):  # no text, a folder, ...
        return False


def _on_hub(name: str) -> bool:
    return bool(name) and name.count("/") <= 1 and not Path(name).exists()


def _teachers(run: Path) -> list[str]:
    """A table of the teachers: problems, and mean weight over the first and last tenth of steps."""
    if not (run / FOLDER).is_dir():
        return []
    table = read_scores(run)
    if not len(table):
        return []
    low, high = pc.min_max(table["step"]).as_py().values()
    tenth, step = max((high - low + 1) // 10, 1), pc.field("step")
    first = _of_each(table.filter(step < low + tenth), "weight", "mean")
    last = _of_each(table.filter(step > high - tenth), "weight", "mean")
    steps = pc.count_distinct(table["step"]).as_py()
    lines = [
        f"Mean weights over the first and last {tenth} of {steps} steps:",
        "",
        "| teacher | problems | weight at first | weight at last |",
        "|---|---|---|---|",
    ]
    for name, problems in _of_each(table, "question_id", "count_distinct").items():
        shown = [f"{part[name]:.3f}" if name in part else "" for part in (first, last)]
        lines.append(f"| {_plain(name)} | {problems} | {' | '.join(shown)} |")
    return lines


def _of_each(table: pa.Table, column: str, what: str) -> dict[str, Any]:
    """Returns teacher -> an aggregate of a column, in order of appearance."""
    found = table.group_by("teacher", use_threads=False).aggregate([(column, what)])
    return dict(
        zip(found["teacher"].to_pylist(), found[f"{column}_{what}"].to_pylist(), strict=True)
    )


def _scores(run: Path, student: Path) -> list[str]:
    """Accuracies of the student by `compact evaluate`, and the last losses of the log."""
    lines = []
    for path in sorted(run.glob("*.summary.json")):
        summary = read_json(path)
        if summary.get("status") != "complete" or "accuracy" not in summary:
            continue
        if not is_of(summary, student):
            continue
        check_shape(summary, _SUMMARY, str(path))
        name = path.name.removesuffix(".summary.json")
        lines.append(
            f"- {_plain(name)}, on {_plain(str(summary['settings'].get('data')))}: accuracy "
            f"{summary['accuracy']:.3f} ({summary['correct']} of {summary['items']}, 95% interval "
            f"{summary['ci_low']:.3f} to {summary['ci_high']:.3f})"
        )
    state = run / "trainer_state.json"
    logs: list[dict[str, Any]] = []
    if state.exists():
        logs = read_json(state, {"log_history?": [dict]}).get("log_history", [])
    seen: dict[str, tuple[Any, Any]] = {}
    for log in logs:
        for name, value in log.items():
            if name == "loss" or (name.startswith("eval_") and name.endswith(("loss", "nll"))):
                seen[name] = (value, log.get("step"))
    return lines + [f"- {_plain(n)} {v:.4f} at step {s}" for n, (v, s) in seen.items()]


def _training(info: Mapping[str, Any]) -> list[str]:
    settings = info.get("settings", {})
    lines = [
        f"- `{name}`: {_plain(str(settings[name]))}"
        for name in _SHOWN
        if settings.get(name) not in (None, -1)
    ]
    versions = info.get("versions", {})
    if versions:
        lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    if info.get("command"):
        lines += ["", "```bash", info["command"].replace("`", "'"), "```"]
    return lines


def _plain(text: str) -> str:
    """Returns text of the data so that Markdown shows it as it stands, on one line."""
    marked = "".join("\\" + c if c in "\\`*_{}[]<>#|!" else c for c in text)
    return " ".join(marked.split())
