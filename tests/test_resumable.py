"""The store of rows that a killed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact.resumable import ResumableRows, remove_rows, summary_path

SETTINGS = {"model": "m", "limit": None}


def write(path: Path, *keys: str) -> None:
    with ResumableRows(path, SETTINGS, key="id") as rows:
        for key in keys:
            rows.append({"id": key, "text": "one\u2028two"})


@given(cut=st.integers(0, 200))
def test_cut_anywhere_it_continues(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A kill may end the file at any byte: whole rows are kept, and the rest is written again."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write(path, "a", "b", "c")
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with ResumableRows(path, SETTINGS, key="id") as rows:
        kept = list(rows.done)
        assert kept == ["a", "b", "c"][: len(kept)]
        for key in "abc"[len(kept) :]:
            rows.append({"id": key, "text": "one\u2028two"})
    assert path.read_bytes() == whole


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in ("of a new file", "of one that exists"):
        with ResumableRows(path, SETTINGS, key="id") as rows:
            rows.append({"id": "a"})
            with pytest.raises(OSError, match="rows.jsonl: another process writes it"):
                ResumableRows(path, SETTINGS, key="id")
    write(path, "b")


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, "a")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows from other settings \(limit was None, now 3\)"):
        ResumableRows(path, SETTINGS | {"limit": 3}, key="id")
    assert path.read_bytes() == before
    summary_path(path).unlink()
    with pytest.raises(ValueError, match="expected rows.summary.json beside it"):
        ResumableRows(path, SETTINGS, key="id")
    assert path.read_bytes() == before


def test_rows_that_were_refused_are_not_locked(tmp_path: Path) -> None:
    """The error is still alive, as in an interactive session, and with it the object."""
    path = tmp_path / "rows.jsonl"
    write(path, "a")
    with pytest.raises(ValueError, match="other settings") as error:
        ResumableRows(path, SETTINGS | {"limit": 3}, key="id")
    write(path, "b")
    assert error.value.__traceback__ is not None


@pytest.mark.parametrize("side", ["", "[]", "{}", "null", '{"settings": 3}', "\x00"])
def test_a_damaged_summary_is_named(tmp_path: Path, side: str) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, "a")
    summary_path(path).write_text(side)
    with pytest.raises(ValueError, match="rows.summary.json: .*settings"):
        ResumableRows(path, SETTINGS, key="id")


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"null", b"3", b"{", b"\xff", b'{"key": 1}'])
def test_a_damaged_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, "a")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: expected a JSON object with 'id'"):
        ResumableRows(path, SETTINGS, key="id")


def test_summary_and_removal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    with ResumableRows(path, SETTINGS, key="id") as rows:
        assert json.loads(summary_path(path).read_text())["status"] == "running"
        rows.append({"id": "a"})
        rows.complete({"items": 1})
    found = json.loads(summary_path(path).read_text())
    assert found == {"settings": SETTINGS, "status": "complete", "items": 1}
    with ResumableRows(path, SETTINGS, key="id"):
        pass  # nothing was added: the run is still complete
    assert json.loads(summary_path(path).read_text()) == found
    remove_rows(path)
    assert list(path.parent.iterdir()) == []


def test_names_and_settings_that_could_be_taken_for_others(tmp_path: Path) -> None:
    """Two files never share a summary; settings compare as JSON reads them back."""
    names = ("res", "res.jsonl", "res.partial", "res.jsonl.partial")
    assert len({summary_path(Path(name)) for name in names}) == len(names) - 1  # res, res.jsonl
    for _ in range(2):
        with ResumableRows(tmp_path / "x.jsonl", {"a": (1, 2), "b": {1: "x"}}, key="id") as rows:
            rows.append({"id": str(len(rows.done))})
    assert len(rows.done) == 2
