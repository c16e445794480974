"""Writes files whole or not at all, and tells by their content whether files are the same."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_END = 1 << 20  # bytes


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text beside `path` and gives it the name in one step.

    Devices and pipes (/dev/stdout) are written to as they are: a name in their place would hide
    them.

    Raises:
        OSError: the text could not be written; what was at `path` is untouched.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    beside = path.with_name(f".{path.name}.writing")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_output(out: Path, *inputs: str | Path) -> None:
    """Refuses to write over what is read.

    Raises:
        ValueError: `out` is one of the inputs.
    """
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out must be another file than those that are read, got {out}")


def content_of(data: str | Path) -> str:
    """Returns what tells the content of a file from any other: its SHA-256."""
    return hashlib.sha256(Path(data).read_bytes()).hexdigest()


def content_of_student(*names: str | Path | None) -> str:
    """Returns what tells a student's weights from those of another student, or of another day.

    Sizes and both ends of the files: training moves every weight, and gigabytes take a while.

    Args:
        names: folders or files, of a model and its adapter; a name on a hub stands for itself.
    """
    found = hashlib.sha256()
    for name in names:
        if not name:
            continue
        path = Path(name)
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            if not file.is_file() or file.suffix not in _WEIGHTS:
                continue
            with file.open("rb") as content:
                size = file.stat().st_size
                found.update(f"{file.name} {size} ".encode() + content.read(_END))
                content.seek(max(size - _END, 0))
                found.update(content.read(_END))
    return found.hexdigest()
