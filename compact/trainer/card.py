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

import numpy as np

from compact.files import check_shape, read_json, read_text, replace_whole
from compact.student import holds_adapter
from compact.trainer.checkpoints import UNFINISHED_MODEL
from compact.trainer.runlog import FOLDER, read_scores

logger = logging.getLogger(__name__)

NAME = "README.md"
_OURS = "<!-- compact draws this file anew with each evaluation, unless this line is deleted -->"
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
            somebody else's, no card is written.
        run: the folder of the run.
    """
    final = folder.parent if folder.name == UNFINISHED_MODEL else folder
    if folder.is_dir():
        (folder / NAME).unlink(missing_ok=True)  # that of peft
        card = _drawn(run, folder) if _is_ours(final) else None
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


def _drawn(run: Path, student_in: Path) -> str | None:
    """Returns the card; None, with a warning, if a file of the run cannot be read.

    A student must be saved, and an accuracy told, whatever else lies in the folder.
    """
    try:
        return card_of(run, student_in)
    except (ValueError, OSError) as error:
        logger.warning("no model card: %s", error)
        return None


def card_of(run: Path, student_in: Path | None = None) -> str:
    """Returns the card of a run's folder as Markdown with the metadata of the hub.

    Args:
        run: the folder of the run.
        student_in: the folder that holds the student's files; None: that of the run.

    Raises:
        ValueError, OSError: a file of the run cannot be read.
    """
    info: dict[str, Any] = {}
    if (run / "run.json").exists():
        info = read_json(run / "run.json", _INFO)
    student = info.get("student", "")
    tags = ["base_model: " + json.dumps(student)] if _on_hub(student) else []
    adapter = holds_adapter(student_in or run)
    library = "library_name: peft" if adapter else "library_name: transformers"
    lines = ["---", *tags, library, "pipeline_tag: text-generation"]
    lines += ["tags:", "- compact", "- distillation", "---", _OURS, f"# {_plain(run.name)}", ""]
    lines += [
        f"A student distilled from the rationales of several teachers: {_plain(student)}, trained "
        "with COMPACT (arXiv 2601.13992), which weighs each rationale problem by problem.",
        "",
    ]
    for title, part in (
        ("Teachers", _teachers(run)),
        ("Data", [f"Rationales: {_plain(info['data'])}"] if info.get("data") else []),
        ("Scores", _scores(run)),
        ("Training", _training(info)),
    ):
        lines += [f"## {title}", "", *part, ""] if part else []
    return "\n".join(lines)


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
    step, weight = (table[name].to_numpy() for name in ("step", "weight"))
    teacher = np.array(table["teacher"].to_pylist())
    question = np.array(table["question_id"].to_pylist())
    tenth = max((step.max() - step.min() + 1) // 10, 1)
    first, last = step < step.min() + tenth, step > step.max() - tenth
    lines = [
        f"Mean weights over the first and last {tenth} of {len(np.unique(step))} steps:",
        "",
        "| teacher | problems | weight at first | weight at last |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(teacher.tolist()):
        mine = teacher == name
        shown = [
            f"{weight[mine & part].mean():.3f}" if (mine & part).any() else ""
            for part in (first, last)
        ]
        lines.append(f"| {_plain(name)} | {len(np.unique(question[mine]))} | {' | '.join(shown)} |")
    return lines


def _scores(run: Path) -> list[str]:
    """Accuracies of `compact evaluate`, and the last losses of the log."""
    lines = []
    for path in sorted(run.glob("*.summary.json")):
        summary = read_json(path)
        if summary.get("status") != "complete" or "accuracy" not in summary:
            continue
        check_shape(summary, _SUMMARY, str(path))
        settings = summary.get("settings", {})
        data = settings.get("data", path.name) if isinstance(settings, dict) else path.name
        lines.append(
            f"- {_plain(str(data))}: accuracy {summary['accuracy']:.3f} ({summary['correct']} of "
            f"{summary['items']}, 95% interval {summary['ci_low']:.3f} to {summary['ci_high']:.3f})"
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
