"""Writes files completely or not at all, and hashes files so that contents can be compared."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_END = 1 << 20  # bytes


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text to a file beside `path`, then renames that file to `path`.

    Devices and pipes (/dev/stdout) are written directly, because renaming would replace them.

    Raises:
        OSError: the text could not be written; the old file at `path` is unchanged.
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
    """Writes a value as JSON, completely or not at all."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_output(out: Path, *inputs: str | Path) -> None:
    """Checks that an output file is not one of the input files.

    Raises:
        ValueError: `out` is one of the inputs.
    """
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out must be another file than the input files, got {out}")


def content_of(data: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(data).read_bytes()).hexdigest()


def content_of_student(*names: str | Path | None) -> str:
    """Returns a SHA-256, in hexadecimal, that changes when the weights of a student change.

    It covers the name, the size and the first and last MiB of each file of weights. Training
    changes every weight, so this is enough, and gigabytes need not be read.

    Args:
        names: folders or files of a model and its adapter; a model on the hub counts by its name.
            None adds nothing to the hash.
    """
    found = hashlib.sha256()
    for name in names:
        if not name:
            continue
        path = Path(name)
        if not path.exists():
            found.update(f"{name} ".encode())
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
