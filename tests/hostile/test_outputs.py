"""Outputs: a file that this tool did not make as what it writes now is never replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compact.commands.cli import main
from compact.files import (
    check_output,
    content_of,
    content_of_student,
    write_json,
    write_whole,
)
from compact.lab import zoo
from compact.resumable import ResumableRows, summary_path
from compact.trainer.checkpoints import check_fresh, check_not_student
from helpers.commands import fails, run

FOREIGN = [b"my notes", b"{}", b"[]", b'{"question_id": "q"}\n', b"<html></html>", b"\x89PNG", b" "]
KINDS = ["report", "scores", "rationales", "picture of a graph", "comparison"]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_somebody_else_stays(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(OSError, match="out: exists, and compact did not make it"):
        write_whole(path, "new", kind=kind)
    assert path.read_bytes() == content and not list(tmp_path.glob(".*.writing"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_is_replaced_until_somebody_changes_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    for text in ("one", "two", "two", "three"):
        write_whole(path, text, kind=kind)
        assert path.read_text() == text
    with pytest.raises(OSError, match=f"compact made it as {kind}"):
        write_whole(path, "four", kind="another kind")
    path.write_text("edited by hand")
    with pytest.raises(OSError, match="did not make it"):
        write_whole(path, "four", kind=kind)
    assert path.read_text() == "edited by hand"


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_as_a_file(tmp_path: Path, name: str) -> None:
    """What the shell appends to is kept, and messages go to standard error."""
    rows = [{"question": "1?", "cot": "so 1"}, {"question": "2?", "cot": "so 2"}]
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = tmp_path / "mine.txt"
    mine.write_text("my own line\n")
    argv = [sys.executable, "-m", "compact", "import", str(tmp_path / "x.json")]
    with mine.open("a") as stdout:
        done = subprocess.run(
            [*argv, "--out", name], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    first, *others = mine.read_text().splitlines()
    assert first == "my own line" and [json.loads(row)["prompt"] for row in others] == ["1?", "2?"]
    assert "2 problems" in done.stderr


@pytest.mark.parametrize("option", ["--test-out", "--test_out"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("joined", [True, False])
def test_every_way_to_write_into_a_pipe(
    tmp_path: Path, option: str, name: str, joined: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rows are alone on standard output, however option and file are written."""
    rows = [{"question": f"{i}?", "cot": f"so {i}", "answer": i} for i in range(3)]
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{option}={name}"] if joined else [option, name]
    assert main(["import", str(tmp_path / "x.json"), "--out", str(tmp_path / "o"), *words]) == 0
    written, told = capfd.readouterr()
    (row,) = map(json.loads, written.splitlines())
    assert row["completion"].startswith("so ") and "2 problems" in told


def test_an_empty_file_and_a_link(tmp_path: Path) -> None:
    """`mktemp` makes an empty file; a link is followed, and its target is what counts."""
    (tmp_path / "empty").touch()
    write_whole(tmp_path / "empty", "text")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="did not make it"):
        write_whole(tmp_path / "link", "text")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_a_surrogate_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="expected a file, got a directory"):
        write_whole(tmp_path, "text")
    with pytest.raises(ValueError, match="out: expected text, got half of a surrogate"):
        write_json(tmp_path / "out", "\ud800")
    write_whole(tmp_path / "new" / "folder" / "out", "text")
    assert (tmp_path / "new" / "folder" / "out").read_text() == "text"
    place = tmp_path / "new" / "folder" / "out" / "file"
    with pytest.raises(OSError) as error:
        write_whole(place, "text")
    assert error.value.filename == str(place)
    with pytest.raises(NotADirectoryError, match="out must be a folder, got a file"):
        check_output(place)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "model.safetensors", "model.safetensors.index.json", "m.gguf"),
        *("pytorch_model.bin", "run.json", "trainer_state.json", "compact_state.json"),
        *("manifest.json", "modeling.py", "optimizer.pt", "vocab.json", "merges.txt"),
    ],
)
def test_an_output_has_no_name_of_a_model_or_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="--out must not be named like a file of a model"):
        check_output(tmp_path / name, kind="scores")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rationales in a file that `compact` did not make."""
    path = tmp_path / "data.jsonl"
    rows = zoo.make_rows(("good", "verbose"), 2, seed=1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COMMANDS = {
    "planted": "planted {data} --teachers good --out {out}",
    "import": "import {data} --out {out}",
    "gold": "import {data} --gold {gold} --out {out}",
    "score": "score {data} --model none --out {out}",
    "evaluate": "evaluate --data {data} --model none --out {out}",
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("target", ["data", "gold", "", "folder", "mine.json", "config.json"])
def test_commands_keep_inputs_and_other_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, name: str, target: str
) -> None:
    """Every command with a bad --out fails before it loads a model, and changes nothing."""
    gold = tmp_path / "gold.jsonl"
    gold.write_bytes(data.read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").write_text("mine")
    if target in ("gold", "folder", "mine.json") and name == "evaluate":
        target = "data"
    out = {"data": data, "gold": gold, "": ""}.get(target, tmp_path / target)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    words = [w.format(data=data, gold=gold, out=out) for w in COMMANDS[name].split()]
    line = ""
    try:
        line = fails(capsys, *words)
    except SystemExit as stop:  # argparse
        assert stop.code == 2
        line = capsys.readouterr().err
    assert "out" in line or str(tmp_path) in line
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_planted_and_import_again(tmp_path: Path, data: Path) -> None:
    """The same command twice is fine; its output as input and output is not."""
    out = tmp_path / "new" / "out.jsonl"
    for _ in range(2):
        assert run("planted", data, "--teachers", "good", "--out", out) == 0
    with pytest.raises(OSError, match="made it as rationales with planted errors"):
        run("import", data, "--out", out)
    with pytest.raises(ValueError, match="another file than the input"):
        run("planted", out, "--teachers", "good", "--out", out)


@pytest.mark.parametrize(
    "side", [b"", b"[]", b"3", b"null", b"{}", b'{"settings": []}', b"\xff", b"notes", b'{"a": 1}']
)
def test_rows_keep_a_foreign_summary(tmp_path: Path, side: bytes) -> None:
    """OUT.summary.json of somebody else, with and without a file of rows beside it."""
    path = tmp_path / "rows.jsonl"
    summary_path(path).write_bytes(side)
    for rows in (None, b'{"id": "a"}\n'):
        if rows is not None:
            path.write_bytes(rows)
        with pytest.raises(ValueError, match=r"rows.summary.json"):
            ResumableRows(path, {}, key="id")
        assert summary_path(path).read_bytes() == side
        assert rows is None or path.read_bytes() == rows


def test_what_others_added_to_a_summary_stays(tmp_path: Path) -> None:
    """A second `evaluate` without --retained keeps the forgetting figures."""
    path = tmp_path / "rows.jsonl"
    with ResumableRows(path, {"a": 1}, key="id") as rows:
        rows.append({"id": "x"})
        rows.complete({"n": 1})
    side = json.loads(summary_path(path).read_text())
    summary_path(path).write_text(json.dumps(side | {"forgetting": {"tasks": {}}}))
    with ResumableRows(path, {"a": 1}, key="id") as rows:
        rows.complete({"n": 2})
    found = json.loads(summary_path(path).read_text())
    assert found["forgetting"] == {"tasks": {}} and found["n"] == 2


@pytest.mark.parametrize(
    "name,content",
    [
        ("config.json", "{}"),
        ("model.safetensors", ""),
        ("model-00001-of-00002.safetensors", ""),
        ("model.safetensors.index.json", "{}"),
        ("pytorch_model.bin", ""),
        ("adapter_config.json", "{}"),
        ("adapter_model.safetensors", ""),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{}"),
        ("student.gguf", ""),
        ("vocab.json", "{}"),
        ("merges.txt", ""),
        ("checkpoint-4/manifest.json", "damaged"),
        ("checkpoint-4/x", ""),
        ("run.json", '{"student": "s", "status": "complete"}'),
        ("run.json", "[]"),
        ("run.json", "notes"),
        ("run.json", '{"mine": 1}'),
    ],
)
def test_a_new_run_writes_over_no_run_and_no_model(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises((ValueError, OSError)) as error:
        check_fresh(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)
    assert path.read_text() == content


def test_a_new_run_may_start(tmp_path: Path) -> None:
    """In no folder, an empty one, one with other files, and that of a run killed early."""
    check_fresh(tmp_path / "run")
    (tmp_path / "run").mkdir()
    check_fresh(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "run.json").write_text('{"student": "s", "status": "running"}')
    check_fresh(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="expected a folder"):
        check_fresh(tmp_path / "file")


def test_the_student_is_not_the_output(tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (tmp_path / "link").symlink_to(student)
    for folder in (student, tmp_path / "link", student / ".." / "student"):
        with pytest.raises(ValueError, match="output_dir must be another folder"):
            check_not_student(folder, "hub/name", str(student))
    check_not_student(tmp_path / "other", str(student))


def test_content_of_a_student_changes_with_its_middle(tmp_path: Path) -> None:
    """A merged adapter may leave both ends of the file, embeddings and norms, as they were."""
    weights = tmp_path / "model.safetensors"
    found = set()
    for value in (0, 1):
        weights.write_bytes(bytes(4 << 20) + bytes([value]) * (1 << 20) + bytes(4 << 20))
        found.add(content_of_student(tmp_path))
    assert len(found) == 2


def test_content_of_a_large_file(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "x"
    path.write_bytes(b"ab" * (3 << 19))
    assert content_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
