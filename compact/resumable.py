"""Saves the results of a long run as JSON lines, so that a killed run can resume.

NAME.jsonl has one row per result. NAME.summary.json has the settings of the run and, when the run
is complete, its summary. A file whose rows come from other settings is refused.
"""

from __future__ import annotations

import fcntl
import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from compact.files import as_json, check_shape, decoded, parse_json, read_json, replace_whole

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on

Row = dict[str, Any]
_SUMMARY = {"settings": dict, "status?": str}


def summary_path(rows: Path) -> Path:
    """Returns the file of settings and summary for a file of rows: x.jsonl -> x.summary.json.

    Any other name keeps its suffix, so that two files of rows never share a summary.
    """
    return rows.with_name(rows.name.removesuffix(".jsonl") + ".summary.json")


def remove_rows(rows: Path) -> None:
    """Removes a file of rows and its summary, once their results are saved elsewhere."""
    for path in (rows, summary_path(rows)):
        path.unlink(missing_ok=True)


def read_summary(rows: Path) -> Row:
    """Returns the summary of a file of rows.

    Raises:
        ValueError, OSError: it cannot be read, or is no summary.
    """
    side = summary_path(rows)
    try:
        summary: Row = read_json(side, _SUMMARY)
    except ValueError as error:
        what = str(error).removeprefix(f"{side}: ")
        raise ValueError(
            f"{side}: expected a summary with 'settings' ({what}); delete it and its "
            "rows, or choose another --out"
        ) from None
    return summary


def add_to_summary(rows: Path, more: dict[str, Any]) -> None:
    """Adds fields to the summary of a complete file of rows; they stay until a row is added.

    Raises:
        ValueError, OSError: as in `read_summary`, or it cannot be written.
    """
    replace_whole(summary_path(rows), as_json(read_summary(rows) | more))


class Rows:
    """Keeps the rows of a run that saves nothing.

    Attributes:
        done: key -> row.
    """

    def __init__(self, key: str) -> None:
        """Takes the field that identifies a row."""
        self.key = key
        self.done: dict[str, Row] = {}

    def append(self, row: Row) -> None:
        """Adds a row to `done`."""
        self.done[str(row[self.key])] = row

    def complete(self, summary: dict[str, Any]) -> None:
        """Says that there are no more rows."""

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """Says that no more rows are added by this process."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ResumableRows(Rows):
    """Appends rows to a file, and reads the rows that interrupted runs have written to it.

    Attributes:
        done: key -> row, of this run and of earlier ones.
    """

    def __init__(
        self, path: str | Path, settings: dict[str, Any], *, key: str, shape: Any = dict
    ) -> None:
        """Opens the file, which may have rows of an interrupted run, and creates its folders.

        Args:
            path: the file of rows. An incomplete last line is removed.
            settings: what the rows depend on, as JSON values.
            key: the field that identifies a row.
            shape: what a row must look like, see `check_shape`.

        Raises:
            ValueError: the file belongs to a run with other settings, its summary is missing or is
                somebody else's file, or a line is not a row.
            OSError: a file cannot be read or written, or another process writes it.
        """
        super().__init__(key)
        self.path, self.shape = Path(path), shape
        self._running = False
        self._kept: dict[str, Any] = {}  # what others added to the summary of a complete run
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they are read back
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:  # closes the files, and so unlocks them, if this fails
            held = self.path.is_file()
            if held:  # before it is read: another process may be writing the incomplete last line
                opened.enter_context(_hold(self.path.open("rb")))
            self.done = self._read()
            if not self.done:
                self._mark_running()
            self._file = opened.enter_context(self.path.open("a", encoding="utf-8"))
            if not held:
                _hold(self._file)
            self._opened = opened.pop_all()

    def append(self, row: Row) -> None:
        """Adds a row to the file and to `done`.

        Raises:
            OSError: the row cannot be written, for example on a full disk.
        """
        if not self._running:  # the summary of a complete run stays until a row is added
            self._mark_running()
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        super().append(row)

    def complete(self, summary: dict[str, Any]) -> None:
        """Marks the run as complete and saves its summary."""
        about = {"settings": self.settings, "status": "complete", **self._kept, **summary}
        replace_whole(summary_path(self.path), as_json(about))

    def _mark_running(self) -> None:
        about = {"settings": self.settings, "status": "running"}
        replace_whole(summary_path(self.path), as_json(about))
        self._running, self._kept = True, {}

    def close(self) -> None:
        """Closes the file, which unlocks it."""
        self._opened.close()

    def _read(self) -> dict[str, Row]:
        side = summary_path(self.path)
        before = read_summary(self.path) if side.exists() else None  # never over another file
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path}: expected a file, got a directory")
        if not self.path.exists() or self.path.stat().st_size == 0:
            return {}
        if before is None:
            raise ValueError(
                f"{self.path}: expected {side.name} beside it, found none; choose another --out or "
                f"delete {self.path.name}"
            )
        settings = before["settings"]
        changed = sorted(
            name
            for name in self.settings.keys() | settings.keys()
            if self.settings.get(name) != settings.get(name)
        )
        if changed:
            what = ", ".join(
                f"{name} was {settings.get(name)!r}, now {self.settings.get(name)!r}"
                for name in changed
            )
            raise ValueError(
                f"{self.path}: has rows from other settings ({what}); delete it or choose another "
                "--out"
            )
        if before.get("status") == "complete":
            self._kept = {k: v for k, v in before.items() if k not in ("settings", "status")}
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        done: dict[str, Row] = {}
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            where = f"{self.path}:{number}"
            try:
                row = parse_json(decoded(line, where), where)
                check_shape(row, {self.key: str}, where)
                check_shape(row, self.shape, where)
            except ValueError as error:
                shown = line[:60].decode("utf-8", "replace")
                what = str(error).removeprefix(f"{where}: ")
                raise ValueError(
                    f"{where}: expected a JSON object with {self.key!r}, got {shown!r} ({what}); "
                    "delete the file to start again"
                ) from None
            done[row[self.key]] = row
        return done


def rows_at(
    path: str | Path | None, settings: dict[str, Any], *, key: str, shape: Any = dict
) -> Rows:
    """Returns `ResumableRows`, or `Rows`, which are not saved, if there is no path."""
    return Rows(key) if path is None else ResumableRows(path, settings, key=key, shape=shape)


def _hold(file: IO[Any]) -> IO[Any]:
    """Locks a file of rows until it is closed or this process ends.

    Raises:
        OSError: another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(
            f"{file.name}: another process writes it; wait until it ends"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file
