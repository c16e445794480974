"""Command lines of a hostile user that need no model: one line of error, and no file changes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from compact.commands.cli import main
from compact.evaluation.keep import kept_by
from compact.lab import zoo
from helpers.commands import fails

NODE = {"id": 0, "data": {"text": "a", "teachers": "t", "support": "1.0", "arithmetic": "none"}}
NODE["data"] |= {"mainstream": "true"}
GRAPH = {"directed": True, "multigraph": True, "attrs": None, "nodes": [NODE], "links": []}
TEACHERS = "- name: a\n  base_url: http://127.0.0.1:9/v1\n  model: m\n"
# The files of the folder that the commands run in, beside data.jsonl and q.jsonl.

FILES: dict[str, str | bytes] = {
    "mine.txt": "mine",
    "mine.svg": "mine",
    "mine.jsonl": "mine",
    "empty.jsonl": b"",
    "blank.jsonl": b" \n\t\n",
    "bytes.jsonl": bytes(range(256)),
    "teachers.yaml": TEACHERS,
    "graph.json": json.dumps(GRAPH),
    "card.card.md": "mine",
    "side.summary.json": "mine",
    "text.sqlite": "mine",
    "short.csv": "prompt,completion\na\n",
    "open.csv": 'prompt,completion\n"a\n',
    "quote.csv": 'prompt,completion,answer\n"a"b,c,d\n',
    "latin.csv": b"prompt,completion\n\xff,b\n",
    "twice.csv": "prompt,prompt\n1,2\n",
    "case.csv": "prompt,Prompt\n1,2\n",
    "empty.csv": "",
    "zeros.parquet": b"PAR1" + b"\0" * 50 + b"PAR1",
    "none.parquet": b"",
    "text.parquet": b"mine",
    "inf.json": '[{"prompt": "a", "completion": "b", "answer": 1e999}]',
    "nan.json": '[{"prompt": "a", "completion": "b", "answer": NaN}]',
    "outputs.json": '[{"instruction": "a", "output": []}]',
    "number.json": '[{"instruction": "a", "output": [3]}]',
    "turns.json": '[{"conversations": {}}]',
    "turn.json": '[{"conversations": [{"from": "gpt"}, {}]}]',
    "tool.json": '[{"messages": [{"role":"user","content":"x"},{"role":"tool","content":"y"}]}]',
    "history.json": '[{"instruction": "a", "output": "b", "history": [["x"]]}]',
    "asks.json": json.dumps([{"question": "=" * 60_000, "answer": "="}]),
    "fields.json": '[{"a": 1}]',
    "lost.json": '[{"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"completion": "d"}]',
}
ASK = "collect q.jsonl --teachers teachers.yaml --out"
LINES = {
    # outputs
    "graph graph.json --out graph.json": "another file than the input",
    "graph graph.json --out mine.svg": "mine.svg: exists, and compact did not make it",
    "graph graph.json --out mine.txt": "mine.txt: exists",
    "graph graph.json --out x.gif": "expected the suffix",
    "graph data.jsonl --out x.svg": "data.jsonl",
    "graph mine.txt --out x.svg": "mine.txt: expected a saved graph",
    "planted data.jsonl --teachers good --out mine.txt": "mine.txt: exists",
    "planted data.jsonl --teachers nobody --out p.jsonl": "got 'nobody'",
    "planted q.jsonl --teachers good --out p.jsonl": "q.jsonl:1: field 'teacher'",
    "planted data.jsonl --teachers good --out mine.txt/p.jsonl": "mine.txt",
    "score data.jsonl --model m --out o.jsonl --limit 0": "--limit must be",
    "score data.jsonl --model m --out o.jsonl --limit -3": "--limit must be",
    "score data.jsonl --model m --out o.jsonl --leaf_budget nan": "--leaf_budget must be",
    "score data.jsonl --model m --out o.jsonl --top 1": "--kept must be given",
    "score data.jsonl --model m --out o.jsonl --top 0 --kept k.jsonl": "--top must be",
    "score data.jsonl --model m --out o.jsonl --top 1 --kept o.jsonl": "must be different files",
    "score data.jsonl --model m --out o.jsonl --top 1 --kept data.jsonl": "another file than",
    "score data.jsonl --model m --out o.jsonl --teachers data.jsonl": "another file than",
    "score data.jsonl --model m --out o.jsonl --keep weight --kept data.jsonl": "another file",
    "score data.jsonl --model m --out o.jsonl --keep f(weight) --kept k.jsonl": "--keep may hold",
    "score data.jsonl --model m --out o.jsonl --keep [] --kept k.jsonl": "--keep may hold",
    "score data.jsonl --model m --out o.jsonl --keep x>1 --kept k.jsonl": "--keep may hold",
    "score data.jsonl --model m --out o.jsonl --keep weight**9>1 --kept k.jsonl": "--keep may hold",
    "score data.jsonl --model m --out o.jsonl --keep 'a'<1 --kept k.jsonl": "--keep may hold",
    "score data.jsonl --model m --out o.jsonl --preset answer-vote --keep validity>1 "
    "--kept k.jsonl": "the rows have no validity",
    "collect q.jsonl --teachers t.yaml --out o.jsonl --export_only --dry_run": "--dry_run must be",
    "evaluate --data q.jsonl --model m --out q.jsonl": "another file than the input",
    "evaluate --data q.jsonl --model m --out e.jsonl --limit 0": "--limit must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --batch_size -1": "--batch_size must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --max_new_tokens 0": "--max_new_tokens must",
    "evaluate --data q.jsonl --model m --out e.jsonl --num_processes 0": "--num_processes must",
    "evaluate --data q.jsonl --model m --out e.jsonl --part 0/2": "--part must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --part 3/2": "--part must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --part x": "--part must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --answer_type date": "q.jsonl: question_id",
    "evaluate --data q.jsonl --model m --out e.jsonl --endpoint ftp://x": "--endpoint must be",
    "evaluate --data q.jsonl --model m --out e.jsonl --endpoint http://u:p@x/v1": "--endpoint",
    "evaluate --data q.jsonl --model m --out text.jsonl --endpoint http://x/v1": "text.sqlite",
    f"{ASK} data.jsonl": "data.jsonl: exists",
    f"{ASK} card.jsonl": "card.card.md: exists",
    f"{ASK} side.jsonl": "side.summary.json: exists",
    f"{ASK} text.jsonl": "text.sqlite: expected a store",
    f"{ASK} base.jsonl": "base.sqlite: is not a store",
    f"{ASK} c.jsonl --store c.jsonl": "--store must be another file",
    f"{ASK} c.jsonl --store q.jsonl": "q.jsonl: expected a store",
    f"{ASK} c.jsonl --budget nan": "--budget must be",
    f"{ASK} c.jsonl --limit 0": "--limit must be",
    f"{ASK} c.jsonl --dry_run -1": "--dry_run must be",
    "collect q.jsonl --teachers mine.txt --out c.jsonl": "mine.txt: expected a list of teachers",
    "collect q.jsonl --teachers data.jsonl --out c.jsonl": "data.jsonl:",
    "metrics data.jsonl": "--out must be given",
    "metrics data.jsonl --out mine.txt": "mine.txt: expected a folder",
    "metrics data.jsonl --out m.d --part 2/1": "--part must be",
    "metrics data.jsonl --out m.d --limit 0": "--limit must be",
    "metrics data.jsonl data.jsonl --out m.d": "DATA must have different names",
    "report gone.d": "gone.d: no such run folder",
    "report data.jsonl": "data.jsonl: no such run folder",
    "docs nowhere": "page must be one of",
    "docs ../../etc/passwd": "page must be one of",
    "trian --config x.yaml": "did you mean 'train'",
    "--import os.path.nope metrics": "--import os.path.nope:",
    # readers
    "import gone.jsonl --out i.jsonl": "gone.jsonl: no such file",
    "import empty.jsonl --out i.jsonl": "empty.jsonl: expected at least one row",
    "import blank.jsonl --out i.jsonl": "blank.jsonl: expected at least one row",
    "import bytes.jsonl --out i.jsonl": "bytes.jsonl:",
    "import mine.jsonl --out i.jsonl": "mine.jsonl:1: expected JSON",
    "import =data.jsonl --out i.jsonl": "files must be [TEACHER=]FILE",
    "import a= --out i.jsonl": "files must be [TEACHER=]FILE",
    "import hub: --out i.jsonl": "expected hub:OWNER/NAME",
    "import hub:@x --out i.jsonl": "expected hub:OWNER/NAME",
    "import owner/name --out i.jsonl": "on the hub: hub:owner/name",
    "import data.jsonl --gold mine.txt --out i.jsonl": "mine.txt:1: expected JSON",
    "import data.jsonl --samples 0 --out i.jsonl": "--samples must be",
    "import short.csv --out i.jsonl": "short.csv:2: expected 2 values",
    "import open.csv --out i.jsonl": "open.csv:2: expected a row of CSV",
    "import quote.csv --out i.jsonl": "quote.csv:2: expected a row of CSV",
    "import latin.csv --out i.jsonl": "latin.csv:2: expected UTF-8",
    "import twice.csv --out i.jsonl": "twice.csv:1: expected names of columns",
    "import case.csv --out i.jsonl": "case.csv:2: the key 'prompt' twice",
    "import empty.csv --out i.jsonl": "empty.csv: expected at least one row",
    "import zeros.parquet --out i.jsonl": "zeros.parquet: expected a Parquet file",
    "import none.parquet --out i.jsonl": "none.parquet: expected a Parquet file",
    "import text.parquet --out i.jsonl": "text.parquet: expected a Parquet file",
    "import inf.json --out i.jsonl": "inf.json:1: row 1: field 'answer'",
    "import nan.json --out i.jsonl": "nan.json:1: row 1: field 'answer'",
    "import outputs.json --out i.jsonl": "outputs.json:1: row 1: output must list",
    "import number.json --out i.jsonl": "number.json:1: row 1: output[0]",
    "import turns.json --out i.jsonl": "turns.json:1: row 1: conversations must",
    "import turn.json --out i.jsonl": "turn.json:1: row 1: conversations[0]",
    "import tool.json --out i.jsonl": "tool.json:1: row 1: messages[1]",
    "import history.json --out i.jsonl": "history.json:1: row 1: history",
    "import asks.json --out i.jsonl": "asks.json: expected at least one completion",
    "import fields.json --out i.jsonl": "fields.json:1: row 1: expected the fields",
    "import lost.json --out i.jsonl": "lost.json:1: row 3: field 'prompt'",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    rows = zoo.make_rows(("good", "verbose"), 2, seed=1)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [{k: row[k] for k in ("question_id", "prompt", "answer")} for row in rows[::2]]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    for name, content in FILES.items():
        raw = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(raw)
    with sqlite3.connect(tmp_path / "base.sqlite") as base:
        base.execute("CREATE TABLE mine (x)")
    base.close()
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_one_line_and_no_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path, line: str
) -> None:
    monkeypatch.chdir(place)
    before = {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}
    error = fails(capsys, *line.split())
    assert LINES[line] in error, error
    assert {n: (place / n).read_bytes() for n in before} == before


@pytest.mark.parametrize("kind", ["hard link", "link", "link to a link", "other spelling"])
def test_an_input_under_another_name(
    capsys: pytest.CaptureFixture[str], place: Path, kind: str
) -> None:
    data, out = place / "data.jsonl", place / "out.jsonl"
    if kind == "hard link":
        out.hardlink_to(data)
    elif kind == "link":
        out.symlink_to(data)
    elif kind == "link to a link":
        (place / "first").symlink_to(data)
        out.symlink_to(place / "first")
    else:
        out = place / "x" / ".." / "data.jsonl"
        (place / "x").mkdir()
    before = data.read_bytes()
    for words in (["planted", "--teachers", "good"], ["import"], ["score", "--model", "m"]):
        line = fails(capsys, words[0], str(data), *words[1:], "--out", str(out))
        assert "another file than the input" in line
    assert data.read_bytes() == before


def test_names_that_the_terminal_cannot_show(place: Path) -> None:
    """A command whose work is done does not fail because of what it prints."""
    row = json.loads((place / "data.jsonl").read_text().splitlines()[0])
    source, out = place / "source.jsonl", place / "out.jsonl"
    source.write_text(json.dumps(row | {"teacher": "Zoë"}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "compact", "import", str(source), "--out", str(out)],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Zo\\xeb 1" in done.stdout


def test_parquet_with_a_name_that_is_not_utf_8(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    path = place / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": "b"}]), path)
    path.write_bytes(path.read_bytes().replace(b"completion", b"comple\xdcion"))
    line = fails(capsys, "import", str(path), "--out", str(place / "out.jsonl"))
    assert f"{path}: expected a Parquet file" in line


def test_labelled_data_without_a_wrong_rationale(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """Nothing to measure: said before a page is written."""
    out = place / "bench"
    line = fails(capsys, "metrics", str(place / "data.jsonl"), "--out", str(out), "--limit", "1")
    assert "expected a question with right and wrong rationales" in line
    assert not list(out.iterdir())


def test_an_expression_is_refused_before_the_scores() -> None:
    for bad in ("().__class__", "weight if K else 1", "lambda: 1", "weight > 'a'", "(K := 1) > 0"):
        with pytest.raises(ValueError, match="--keep"):
            kept_by([], bad)


def test_a_file_given_twice_is_read_once(place: Path) -> None:
    out = place / "out.jsonl"
    data = str(place / "data.jsonl")
    assert main(["import", data, data, "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 4
