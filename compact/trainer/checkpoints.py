"""Writes checkpoints completely or not at all: staged, listed with checksums, then renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

MANIFEST = "manifest.json"
UNFINISHED_MODEL = "unfinished-model"
_OLDER = "older-"
_NAME = re.compile(r"checkpoint-(\d+)")


def staging_folder(final: Path) -> Path:
    """Returns the folder to write a checkpoint in; its name is not one of a checkpoint."""
    return final.with_name(f"unfinished-{final.name}")


def clear_unfinished(run: Path) -> None:
    """Removes unfinished checkpoints and models of a run that was killed."""
    _restore_older(run)
    aside = run.glob(f"{_OLDER}checkpoint-*")
    for folder in (run / UNFINISHED_MODEL, *run.glob("unfinished-checkpoint-*"), *aside):
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, final: Path) -> None:
    """Writes the manifest of a staged checkpoint, syncs all files to disk, renames the folder."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    listing = {str(p.relative_to(staged)): [p.stat().st_size, _checksum(p)] for p in files}
    (staged / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    for path in (*files, staged / MANIFEST, staged):
        _sync(path)
    # An older checkpoint of the step is removed once the new one has its name, not before. If the
    # run is killed between the two renames, `_restore_older` gives the older one its name back.
    older = final.with_name(_OLDER + final.name)
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        final.rename(older)
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def move_whole(staged: Path, final: Path) -> None:
    """Syncs the files of a staged folder to disk and moves them to `final`, weights last."""
    files = [path for path in staged.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.suffix == ".safetensors", path.name))
    for path in files:
        _sync(path)
    for path in files:
        target = final / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(staged)
    _sync(final)


def damage(checkpoint: Path) -> str | None:
    """Returns what is damaged in a checkpoint; None if every file is as it was written."""
    try:
        listing = json.loads((checkpoint / MANIFEST).read_text())["files"]
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
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Finds the newest undamaged checkpoint of a run.

    Returns:
        Its folder, or None if there is none; and one line of text for each newer, damaged one.
    """
    _restore_older(run)
    damaged: list[str] = []
    for checkpoint in sorted(run.glob("checkpoint-*"), key=_step, reverse=True):
        if _NAME.fullmatch(checkpoint.name) is None or not checkpoint.is_dir():
            continue
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged: {problem}")
    return None, damaged


def _restore_older(run: Path) -> None:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
