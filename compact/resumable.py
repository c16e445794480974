"""Saves the results of a long run as JSON lines, so that a killed run can resume.

NAME.jsonl has one row per result. NAME.summary.json has the settings of the run and, when the run
is complete, its summary. A file whose rows come from other settings is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from compact.files import write_json

Row = dict[str, Any]


def summary_path(rows: Path) -> Path:
    """Returns the file of settings and summary for a file of rows: x.jsonl -> x.summary.json.

    Any other name keeps its suffix, so that two files of rows never share a summary.
    """
    return rows.with_name(rows.name.removesuffix(".jsonl") + ".summary.json")


def remove_rows(rows: Path) -> None:
    """Removes a file of rows and its summary, once their results are saved elsewhere."""
    for path in (rows, summary_path(rows)):
        path.unlink(missing_ok=True)


class ResumableRows:
    """Appends rows to a file, and reads the rows that interrupted runs have written to it.

    Attributes:
        done: key -> row, of this run and of earlier ones.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, key: str) -> None:
        """Opens the file, which may have rows of an interrupted run, and creates its folders.

        Args:
            path: the file of rows. An incomplete last line is removed.
            settings: what the rows depend on, as JSON values.
            key: the field that identifies a row.

        Raises:
            ValueError: the file belongs to a run with other settings, its summary is missing, or a
                line is not a row.
            OSError: a file cannot be read or written.
        """
        self.path, self.key, self._running = Path(path), key, False
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._read()
        if not self.done:
            self._mark_running()
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Adds a row to the file and to `done`.

        Raises:
            OSError: the row cannot be written, for example on a full disk.
        """
        if not self._running:  # the summary of a complete run stays until a row is added
            self._mark_running()
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.done[str(row[self.key])] = row

    def complete(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete and saves its summary."""
        about = {"settings": self.settings, "status": "complete", **summary}
        write_json(summary_path(self.path), about)

    def _mark_running(self) -> None:
        about = {"settings": self.settings, "status": "running"}
        write_json(summary_path(self.path), about)
        self._running = True

    def __enter__(self) -> ResumableRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def _read(self) -> dict[str, Row]:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return {}
        side = summary_path(self.path)
        if not side.exists():
            raise ValueError(
                f"{self.path}: expected {side.name} beside it, found none; choose another --out or "
                f"delete {self.path.name}"
            )
        before = _settings_in(side)
        changed = sorted(
            name
            for name in self.settings.keys() | before.keys()
            if self.settings.get(name) != before.get(name)
        )
        if changed:
            what = ", ".join(
                f"{name} was {before.get(name)!r}, now {self.settings.get(name)!r}"
                for name in changed
            )
            raise ValueError(
                f"{self.path}: has rows from other settings ({what}); delete it or choose another "
                "--out"
            )
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        done: dict[str, Row] = {}
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                done[str(row[self.key])] = row
            except (ValueError, KeyError, TypeError) as error:
                shown = line[:60].decode("utf-8", "replace")
                raise ValueError(
                    f"{self.path}:{number}: expected a JSON object with {self.key!r}, got "
                    f"{shown!r}; delete the file to start again"
                ) from error
        return done


def _settings_in(side: Path) -> dict[str, Any]:
    """Reads the settings of an earlier run from its summary."""
    try:
        found = json.loads(side.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{side}: expected a JSON object with 'settings'; delete it and its rows"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{side}: settings must be an object, got {type(found).__name__}")
    return found
