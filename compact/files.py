"""Writes files whole or not at all, so that a killed run leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


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
