"""`compact collect`: its options, what it prints and writes, and the page about it."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from compact.commands.cli import main
from compact.data import load_problems
from compact.strategies.orion import Orion
from compact.teachers.prompts import TEMPLATES
from compact.teachers.spec import Teacher, read_teachers
from helpers.commands import fails
from helpers.hostile_server import HostileServer, hostile_server

PAGE = Path(__file__).parents[2] / "docs/collect.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with six questions."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question_id": f"q{i}", "prompt": f"What is {i} + 2?", "answer": str(i + 2)}
        for i in range(6)
    ]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def collect(server: HostileServer, *words: str, **keys: object) -> int:
    """Runs `compact collect` with one teacher."""
    entry = {"name": "a", "model": "m", "base_url": server.url, "timeout": 5.0, **keys}
    Path("teachers.yaml").write_text(yaml.safe_dump([entry]))
    given = ["questions.jsonl", "--teachers", "teachers.yaml", "--out", "out.jsonl"]
    return main(["collect", *given, "--first_wait", "0.01", *words])


def test_what_it_writes_and_prints(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hostile_server() as server:
        assert collect(server, "--limit", "4", price={"in": 1, "out": 2}) == 0
    assert "4 rationales of 4 questions -> out.jsonl" in capsys.readouterr().out
    row = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == "What is 0 + 2?" and row["answer"] == "2" and row["count"] == 1
    assert row["mark"] in ("right", "wrong") and row["stated"] in row["completion"]
    account = json.loads(Path("out.summary.json").read_text())["teachers"]["a"]
    assert account["cost"] == pytest.approx(4 * (20 + 2 * 10) / 1e6) and account["requests"] == 4
    card = Path("out.card.md").read_text()
    assert "| a | m | 127.0.0.1 |" in card and "Template `step-by-step`" in card


def test_questions_without_gold_answers(place: Path) -> None:
    Path("questions.jsonl").write_text('{"question_id": "q", "prompt": "What is 3 + 4?"}\n')
    with hostile_server() as server:
        assert collect(server) == 0
    (row,) = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert "answer" not in row and row["mark"] is None and row["stated"] in ("7", "8")
    assert load_problems("out.jsonl")[0].answer is None


def test_what_is_missing_is_fetched_by_the_command_it_names(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hostile_server(faults=1.0, kinds=["500"]) as server:
        given = ["questions.jsonl", "--teachers", "teachers.yaml", "--out", "out.jsonl"]
        monkeypatch.setattr(sys, "argv", ["compact", "collect", *given])
        assert collect(server, "--attempts", "1") == 1
        printed = capsys.readouterr().out
        assert "missing: 6 of a" in printed and server.requests == 6
        server.faults = 0.0
        _, *words = shlex.split(printed.split("To ask for them: ")[1])
        assert main(words) == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 6


def test_answers_that_stay_empty_are_kept_as_such(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the last attempt; asked for ever, they would be paid for ever."""
    with hostile_server(faults=1.0, kinds=["empty content"]) as server:
        assert collect(server, "--attempts", "2", "--first_wait", "0") == 0
        assert server.requests == 12 and "12 empty" in capsys.readouterr().out
        assert collect(server) == 0 and server.requests == 12
    assert Path("out.jsonl").read_text() == ""


def test_a_dry_run_asks_a_sample_and_keeps_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server() as server:
        price = {"out": 1e5}
        assert collect(server, "--dry_run", "0", price=price) == 0 and server.requests == 0
        assert "6 of 6 requests left, no answer yet" in capsys.readouterr().out
        assert collect(server, "--dry_run", price=price) == 0 and server.requests == 3
        assert "3 of 6 requests left, about 90 tokens, cost 3 " in capsys.readouterr().out
        assert not Path("out.jsonl").exists()
        assert collect(server, price=price) == 0 and server.requests == 6


def test_an_estimate_says_what_it_does_not_know(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server() as server:
        for keys in ({"price": {"out": 1}, "max_tokens": None}, {}):
            assert collect(server, "--dry_run", "1", **keys) == 0
            line = capsys.readouterr().out.splitlines()[0]
            assert "(no upper bound of the cost)" in line and (", cost" in line) == bool(keys)


def test_answers_of_two_models_are_news(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server of one address gave way to another."""
    with hostile_server() as server:
        assert collect(server, "--limit", "2") == 0
        assert "models" not in capsys.readouterr().out
        with sqlite3.connect("out.sqlite") as database:
            database.execute("UPDATE answers SET model = 'older'")
        assert collect(server) == 0
    assert "the answers of a are those of models m, older" in capsys.readouterr().out


def test_samples_that_never_differ_are_news(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server() as server:
        assert collect(server, n=2, temperature=0.7) == 0
        assert "all samples of a are equal" in capsys.readouterr().out


def test_what_is_there_is_written_without_asking(place: Path) -> None:
    with hostile_server() as server:
        assert collect(server, "--dry_run", "2") == 0
        assert collect(server, "--export_only") == 1 and server.requests == 2
    assert len(load_problems("out.jsonl")) == 2


def test_a_file_of_others_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.jsonl").write_text("mine\n")
    Path("teachers.yaml").write_text("- {name: a, model: m, base_url: 'http://127.0.0.1:1/v1'}")
    words = ["questions.jsonl", "--teachers", "teachers.yaml", "--out", "out.jsonl"]
    assert "out.jsonl: exists, and compact did not make it" in fails(capsys, "collect", *words)
    assert "--budget must be a number of at least 0" in fails(
        capsys, "collect", *words, "--budget", "-1"
    )
    assert "--limit must be a number of at least 1" in fails(
        capsys, "collect", *words, "--limit", "0"
    )
    assert Path("out.jsonl").read_text() == "mine\n"


# --- docs/collect.md --------------------------------------------------------------------------


def test_the_page_collects(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its question, its teachers (at a server of this test) and its commands."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-page")
    Path("questions.jsonl").write_text(blocks("json")[0])
    (text,) = blocks("yaml")
    with hostile_server() as server:
        Path("teachers.yaml").write_text(re.sub(r"https?://\S+/v1", server.url, text))
        text = PAGE.read_text().replace("\\\n", " ")
        commands = re.findall(r"^compact collect .*$", text, re.MULTILINE)
        *asked, routed = [shlex.split(line) for line in commands]
        assert len(asked) == 2
        for words in asked:
            assert main(words[1:]) == 0
        assert server.requests == 4
        assert "less than the 1 questions, got 200" in fails(capsys, *routed[1:])
        (options,) = re.findall(r"--strategy_options '(.*)'", text)
        writer = Orion(**yaml.safe_load(options)).writer
        assert writer is not None and writer.settings["model"] == "Qwen/Qwen3-8B"
    names = {rationale.teacher for rationale in load_problems("rationales.jsonl")[0].rationales}
    assert names == {"qwen", "paid#1", "formal"}


def test_the_page_lists_every_key_and_template() -> None:
    text = PAGE.read_text()
    keys = text.split("## 2.")[0].splitlines()
    table = [row.split("|")[1] for row in keys if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", "".join(table))) == {field.name for field in fields(Teacher)}
    assert set(TEMPLATES) <= set(re.findall(r"`([\w-]+)`", text.split("Templates:")[1]))


def test_the_teachers_of_the_page_are_read(place: Path) -> None:
    Path("teachers.yaml").write_text(blocks("yaml")[0])
    assert [teacher.name for teacher in read_teachers("teachers.yaml")] == [
        "qwen",
        "paid",
        "formal",
    ]
