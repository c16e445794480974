"""Checks the header of a .gguf file before a library reads it.

The reader of the package gguf trusts every count in a file: one that promises 10^18 entries keeps
it busy for ever. Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

MOST_ENTRIES = 1 << 16
"""Most keys and most tensors of a file; large models have some thousands."""
# Number of a value's type -> its format in `struct`.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_MOST_DIMENSIONS = 4


def check_gguf(path: Path, most_layers: int) -> None:
    """Checks that every entry of the header ends within the file.

    Takes time in proportion to the header, which is at most that of the file.

    Args:
        path: the file.
        most_layers: most layers that the model may have.

    Raises:
        ValueError: it is no GGUF file, is cut, or asks for more than `MOST_ENTRIES` or layers; the
            message names file and byte.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected a GGUF file, got an empty file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Header(path, data).check(most_layers)


class _Header:
    """A position in the bytes of a file, which moves as values are read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def check(self, most_layers: int) -> None:
        if self.data[:4] != b"GGUF":
            self.fail("GGUF at its start", repr(self.data[:4]))
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            self.fail("version 2 or 3", str(version))
        tensors, keys = self.count(), self.count()
        for _ in range(keys):
            name = self.text()
            kind = self.scalar("I")
            value = self.value(kind, depth=0)
            if name.endswith(b".block_count") and (value is None or value > most_layers):
                self.fail(f"{name[:80]!r} to be at most {most_layers}", str(value))
        for _ in range(tensors):
            self.text()
            dimensions = self.scalar("I")
            if dimensions > _MOST_DIMENSIONS:
                self.fail(f"a tensor of at most {_MOST_DIMENSIONS} dimensions", str(dimensions))
            self.skip(8 * dimensions + 4)
            if (offset := self.scalar("Q")) > len(self.data):
                self.fail("a tensor within the file", f"one at {offset}")

    def fail(self, expected: str, got: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: cannot be read as a GGUF model: expected {expected}, got {got} (before "
            f"byte {self.at})"
        )

    def skip(self, size: int) -> int:
        """Moves over `size` bytes and returns where they start."""
        start = self.at
        if size > len(self.data) - start:
            self.fail(f"{size} more bytes", f"a file of {len(self.data)}, which may be cut")
        self.at += size
        return start

    def scalar(self, kind: str) -> Any:
        return struct.unpack_from("<" + kind, self.data, self.skip(struct.calcsize("<" + kind)))[0]

    def count(self) -> int:
        value = int(self.scalar("Q"))
        if value > MOST_ENTRIES:
            self.fail(f"at most {MOST_ENTRIES} entries", str(value))
        return value

    def text(self) -> bytes:
        size = self.scalar("Q")
        start = self.skip(size)
        return self.data[start : start + min(size, 1 << 16)]

    def value(self, kind: int, depth: int) -> int | None:
        """Reads a value; returns a number, and None for anything else."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])  # type: ignore[no-any-return]
        if kind == _TEXT:
            self.text()
        elif kind == _LIST and depth == 0:
            inner, size = self.scalar("I"), self.scalar("Q")
            if inner in _SCALARS:
                self.skip(size * struct.calcsize("<" + _SCALARS[inner]))
            elif inner == _TEXT:
                if 8 * size > len(self.data) - self.at:
                    self.fail(f"{size} texts", f"a file of {len(self.data)} bytes")
                for _ in range(size):
                    self.skip(self.scalar("Q"))
            else:
                self.fail("a list of numbers or texts", f"type {inner}")
        else:
            self.fail("a value of a known type", f"type {kind}")
        return None
