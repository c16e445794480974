"""The log of scores: scores and weights of each rationale in each step, as Parquet.

A step is appended to a journal (an Arrow stream) and flushed at once, so a killed run loses no
step. Every 400 steps and at each checkpoint the journal becomes a Parquet part, which is written
completely or not at all:

    RUN/scores/part-00000001-00000400.parquet    steps 1 to 400
    RUN/scores/journal.arrows                    the steps after them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from compact.files import sync

FOLDER = "scores"
_JOURNAL = "journal.arrows"
_STEPS_A_PART = 400

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # optimizer step, from 1
        ("epoch", pa.float32()),  # passes over the problems before the step
        ("question_id", pa.string()),
        ("teacher", pa.string()),
        ("tokens", pa.int32()),  # of the completion
        ("weight", pa.float32()),
        ("nll", pa.float32()),  # mean over the completion, nats; null if it was not read
        ("adaptability", pa.float32()),  # scores of the axes; null if not read, or with a policy
        ("consensus", pa.float32()),
        ("difficulty", pa.float32()),
        ("z_adaptability", pa.float32()),
        ("z_consensus", pa.float32()),
        ("z_difficulty", pa.float32()),
        ("validity", pa.float32()),  # it multiplies the weight; null where a preset does not ask
    ]
)


def read_scores(run: str | Path) -> pa.Table:
    """Returns the log of a run folder in order of steps, one row per step and rationale (`SCHEMA`).

    Raises:
        FileNotFoundError: the run has no log of scores.
    """
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; the run has no log of scores")
    return _join(_read_parts(folder), _read_journal(folder / _JOURNAL))


class ScoreLog:
    """Appends steps to the log of a run. Only one process may write."""

    def __init__(self, run: str | Path, last_step: int = 0) -> None:
        """Opens the log after `last_step`; steps of a killed run after it are removed."""
        self.folder = Path(run) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        table = read_scores(run)
        late = [part for part in self.folder.glob("part-*.parquet") if _steps(part)[1] > last_step]
        kept = max((_steps(p)[1] for p in self.folder.glob("part-*") if p not in late), default=0)
        step = pc.field("step")
        self._write_part(table.filter((step > kept) & (step <= last_step)))
        for part in late:
            part.unlink()
        self._open_journal()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends the rows of one step; a key that a row lacks is null.

        Raises:
            OSError: the rows could not be written.
        """
        table = pa.array(rows, pa.struct(list(SCHEMA)))  # half the time of from_pylist
        self._writer.write_batch(pa.RecordBatch.from_struct_array(table))
        self._file.flush()
        self._since += 1
        if self._since >= _STEPS_A_PART:
            self.seal()

    def seal(self) -> None:
        """Turns the journal into a Parquet part."""
        self._close_journal()
        self._write_part(_read_journal(self.folder / _JOURNAL))
        self._open_journal()

    def close(self) -> None:
        """Seals and closes the log."""
        self._close_journal()
        self._write_part(_read_journal(self.folder / _JOURNAL))
        (self.folder / _JOURNAL).unlink()

    def _open_journal(self) -> None:
        self._since = 0
        self._file = (self.folder / _JOURNAL).open("wb")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._file.flush()

    def _close_journal(self) -> None:
        if self._file.closed:  # a full disk ended `seal`
            return
        try:
            self._writer.close()
        finally:
            self._file.close()

    def _write_part(self, table: pa.Table) -> None:
        if table.num_rows == 0:
            return
        first, last = pc.min_max(table["step"]).as_py().values()
        path = self.folder / f"part-{first:08d}-{last:08d}.parquet"
        unfinished = path.with_suffix(".tmp")
        pq.write_table(table, unfinished, compression="zstd")
        sync(unfinished)
        unfinished.replace(path)
        sync(self.folder)


def _steps(part: Path) -> tuple[int, int]:
    """Returns the first and last step of a part, from its name."""
    _, first, last = part.stem.split("-")
    return int(first), int(last)


def _read_parts(folder: Path) -> pa.Table:
    table = SCHEMA.empty_table()
    for part in sorted(folder.glob("part-*.parquet"), key=_steps):
        table = _join(table, pq.read_table(part, schema=SCHEMA))
    return table


def _join(table: pa.Table, more: pa.Table) -> pa.Table:
    """Appends the steps of `more` that `table` lacks; after a kill, both may hold a step."""
    last = pc.max(table["step"]).as_py() or 0
    return pa.concat_tables([table, more.filter(pc.field("step") > last)])


def _read_journal(path: Path) -> pa.Table:
    """Returns the complete batches of a journal; after a kill the last one may be incomplete."""
    if not path.exists():
        return SCHEMA.empty_table()
    with pa.memory_map(str(path)) as file:
        batches = list(_whole_batches(file))
    if not batches:
        return SCHEMA.empty_table()
    table = pa.Table.from_batches(batches)
    for column in SCHEMA:  # a log of an earlier version may lack columns
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    return table.select(SCHEMA.names)


def _whole_batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    try:
        yield from pa.ipc.open_stream(file)
    except (pa.ArrowInvalid, OSError):
        return
