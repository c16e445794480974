"""Writes checkpoints completely or not at all: staged, listed with checksums, then renamed."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

from compact.files import read_json, sync

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED_MODEL = "unfinished-model"
_MODEL_FILE = re.compile(
    r".*\.(?:safetensors|bin|gguf|index\.json)|(?:adapter_|generation_|tokenizer_)?config\.json"
    r"|tokenizer\.(?:json|model)|vocab\.(?:json|txt)|merges\.txt"
)
_OLDER = "older-"
_SUPERSEDED = "_superseded-"  # transformers pushes no name with "_" to the hub
_NAME = re.compile(r"checkpoint-(\d+)")


def model_file(folder: Path) -> str | None:
    """Returns the name of a file in a folder that belongs to a saved model, None without one."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return next((name for name in names if _MODEL_FILE.fullmatch(name)), None)


def check_no_model(folder: Path) -> None:
    """Raises ValueError if a folder holds files of a model, which saving would replace."""
    held = model_file(folder)
    if held is not None:
        raise ValueError(f"{folder} already holds {held}; choose another folder for the model")


def check_fresh(run: Path, *, own: bool = False) -> None:
    """Checks that a new run in a folder writes over nothing: no model, checkpoint or finished run.

    A run that was killed before its first checkpoint may be started again.

    Args:
        run: the folder.
        own: whether the trainer has used the folder before: only checkpoints count then.

    Raises:
        ValueError: the folder holds one of them, or a run.json that is none of a run.
        OSError: the folder is a file, or cannot be read.
    """
    if run.exists() and not run.is_dir():
        raise NotADirectoryError(f"output_dir {run}: expected a folder, got a file")
    restore_older(run)
    held = sorted(path.name for path in run.glob("checkpoint-*"))
    if held:
        whole, _ = newest_whole(run)
        found = whole.name if whole is not None else f"{held[-1]}, which is damaged"
    else:
        found = "" if own else model_file(run) or ""
    if not found and not own and (run / "run.json").exists():
        status = read_json(run / "run.json", {"student": str, "status": str})["status"]
        found = "a finished run" if status == "complete" else ""
    if found:
        resume = "resume from it (resume_from_checkpoint: true), or " if held else ""
        raise ValueError(
            f"output_dir {run} already holds {found}; {resume}choose another output_dir"
        )


def check_not_student(output_dir: Path, *students: str | Path) -> None:
    """Raises ValueError if `output_dir` is the folder of the student, which saving would overwrite.

    Args:
        output_dir: the folder that the trained student is saved in.
        students: names, folders or files of the student, its adapter and its base model.
    """
    for student in students:
        if output_dir.exists() and Path(student).exists() and output_dir.samefile(student):
            raise ValueError(
                f"output_dir must be another folder than the student's, got {output_dir}"
            )


def staging_folder(final: Path) -> Path:
    """Returns the folder to write a checkpoint in; its name is not one of a checkpoint."""
    return final.with_name(f"unfinished-{final.name}")


def clear_unfinished(run: Path, resumed: Path | None = None) -> None:
    """Removes unfinished checkpoints and models of a run that was killed.

    Args:
        run: the folder of the run.
        resumed: the checkpoint that the run resumes from. Newer ones are renamed to
            _superseded-checkpoint-N: they belong to steps that are now trained again, and a later
            resumption must not take them.
    """
    restore_older(run)
    if resumed is not None and resumed.resolve().parent == run.resolve():
        for newer in [p for p in run.glob("checkpoint-*") if _step(p) > _step(resumed)]:
            aside = newer.with_name(f"{_SUPERSEDED}{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            logger.warning("%s is newer than %s: now %s", newer.name, resumed.name, aside.name)
    left = run.glob(f"{_OLDER}checkpoint-*")
    for folder in (run / UNFINISHED_MODEL, *run.glob("unfinished-checkpoint-*"), *left):
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Writes the manifest of a staged checkpoint, syncs all files to disk, renames the folder."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    listing = {str(p.relative_to(staged)): [p.stat().st_size, _checksum(p)] for p in files}
    (staged / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    folders = [path for path in staged.rglob("*") if path.is_dir()]
    for path in (*files, staged / MANIFEST, *folders, staged):
        sync(path)
    # An older checkpoint of the step is removed once the new one has its name, not before. If the
    # run is killed between the two renames, `restore_older` gives the older one its name back.
    older = final.with_name(_OLDER + final.name)
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        final.rename(older)
    staged.rename(final)
    sync(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def move_whole(staged: Path, final: Path) -> None:
    """Syncs the files of a staged folder to disk and moves them to `final`, weights last."""
    files = [path for path in staged.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.suffix == ".safetensors", path.name))
    for path in files:
        sync(path)
    for path in files:
        target = final / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(staged)
    for folder in {(final / path.relative_to(staged)).parent for path in files} | {final}:
        sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Returns what is damaged in a checkpoint; None if every file is as it was written."""
    try:
        listing = read_json(checkpoint / MANIFEST, {"files": {str: [int]}})["files"]
        for name, (size, checksum) in listing.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if _checksum(path) != checksum:
                return f"the content of {name} has changed (checksum)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, OSError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest undamaged checkpoint of a run.

    Returns:
        Its folder, or None if there is none; and one line of text for each newer, damaged one.
    """
    restore_older(run)
    damaged: list[str] = []
    for checkpoint in sorted(run.glob("checkpoint-*"), key=_step, reverse=True):
        if _NAME.fullmatch(checkpoint.name) is None or not checkpoint.is_dir():
            continue
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged: {problem}")
    return None, damaged


def restore_older(run: Path) -> None:
    """Renames checkpoints back that a killed run had moved aside for one of the same step."""
    for older in run.glob(f"{_OLDER}checkpoint-*"):
        final = older.with_name(older.name.removeprefix(_OLDER))
        if not final.exists():
            with suppress(FileNotFoundError):  # another rank was faster
                older.rename(final)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
