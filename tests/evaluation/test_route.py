"""`compact collect --route`: all teachers first, then the one that suits; started again at will."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from compact.commands.cli import main
from compact.data import load_questions
from compact.evaluation.route import routed
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.teachers.collect import plan
from compact.teachers.spec import Teacher
from helpers.commands import fails
from helpers.hostile_server import HostileServer, hostile_server

FIRST, ALL = 16, 40


def write(model: str, question: str) -> str:
    """`adder` can only add, `taker` can only take away; `fool` is wrong."""
    a, sign, b = re.findall(r"(\d+) ([+-]) (\d+)", question)[0]
    right = model == {"+": "adder", "-": "taker"}[sign]
    found = int(a) + int(b) if sign == "+" else int(a) - int(b)
    return f"{a} {sign} {b} = {found if right else 99}. The answer is {found if right else 99}"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tokenizer = build_tokenizer()
    build_model(tokenizer, 0, hidden=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def collect(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Writes questions and teachers; the words of the command."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i in range(ALL):
        sign, answer = ("+", 30 + 2 * i) if i % 3 else ("-", 30)
        prompt = f"Together {30 + i} + {i}?" if sign == "+" else f"Without, {30 + i} - {i}?"
        rows.append({"question_id": f"q{i}", "prompt": prompt, "answer": str(answer)})
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(server: HostileServer, *more: str, names: str = "adder taker fool") -> list[str]:
        entries = [
            {"name": n, "model": n, "base_url": server.url, "price": {"out": 1e4}, "max_tokens": 20}
            for n in names.split()
        ]
        Path("teachers.yaml").write_text(yaml.safe_dump(entries))
        given = ["questions.jsonl", "--teachers", "teachers.yaml", "--out", "out.jsonl"]
        return ["collect", *given, "--route", str(FIRST), "--student", str(student), *more]

    return words


def test_each_question_goes_to_the_teacher_that_serves_it(
    collect: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server(write=write) as server:
        assert main(collect(server)) == 0
        asked = 3 * FIRST + (ALL - FIRST)
        assert server.requests == asked
        printed = capsys.readouterr().out
        assert "the words of a question choose its teacher" in printed
        assert f"saved {3 * ALL - asked} of {3 * ALL} requests, about 1,440 tokens" in printed
        rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        later = [row for row in rows if int(row["question_id"][1:]) >= FIRST]
        assert len(rows) == asked and {row["mark"] for row in later} == {"right"}
        summary = json.loads(Path("out.summary.json").read_text())
        assert summary["route"]["others"] == {"adder": 16, "taker": 8, "fool": 0}
        assert summary["route"]["saved"]["cost"] == pytest.approx(0.1 * 48)
        before = Path("out.jsonl").read_bytes()
        assert main(collect(server)) == 0 and server.requests == asked
        assert main(collect(server, "--export_only")) == 0 and server.requests == asked
        assert Path("out.jsonl").read_bytes() == before


def test_a_run_that_stopped_goes_on(collect: Callable[..., list[str]]) -> None:
    """The budget ends the first run amid the other questions; the next one fetches the rest."""
    with hostile_server(write=write) as server:
        assert main(collect(server, "--budget", "6")) == 1
        assert 3 * FIRST <= server.requests < 3 * FIRST + ALL - FIRST
        assert main(collect(server)) == 0
        assert server.requests == 3 * FIRST + ALL - FIRST and server.repeated == 0


def test_dead_teachers_are_not_chosen(collect: Callable[..., list[str]]) -> None:
    with hostile_server() as dead:
        pass
    with hostile_server(write=write) as server:
        words = collect(server)
        entries = yaml.safe_load(Path("teachers.yaml").read_text())
        entries[2]["base_url"] = dead.url
        Path("teachers.yaml").write_text(yaml.safe_dump(entries))
        assert main([*words, "--first_wait", "0.01"]) == 1
        assert server.requests == 2 * FIRST + ALL - FIRST
        entries[1]["base_url"] = dead.url  # one is left
        Path("teachers.yaml").write_text(yaml.safe_dump(entries))
        Path("out.sqlite").unlink()
        before = server.requests
        assert main([*words, "--first_wait", "0.01"]) == 1
        assert server.requests == before + FIRST


def test_a_dry_run_estimates_the_first_questions(
    collect: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server(write=write) as server:
        assert main(collect(server, "--dry_run", "2")) == 0 and server.requests == 6
    printed = capsys.readouterr().out
    assert f"adder: {FIRST - 2} of {FIRST} requests left" in printed
    assert f"then one teacher for each of {ALL - FIRST} more questions" in printed


def test_where_it_cannot_work(
    collect: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with hostile_server() as server:
        words = collect(server)
        for more, message in [
            (["--route", "40"], "at least 2 and less than the 40 questions, got 40"),
            (["--route", "1"], "at least 2 and less than the 40 questions, got 1"),
            (["--limit", "10"], "less than the 10 questions"),
            (["--preset", "no"], "no"),
            (["--student", "no/such/folder"], "no/such/folder"),
        ]:
            assert message in fails(capsys, *words, *more)
        assert "at least 2 teachers, got 1" in fails(capsys, *collect(server, names="adder"))
        rows = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
        for row in rows:
            del row["answer"]
        Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = fails(capsys, *collect(server, "--preset", "rejection"))
        assert "rejection needs gold answers" in line
        at = words.index("--student")
        assert "together with --student" in fails(capsys, *words[:at])
        assert server.requests == 0


def test_who_answered_a_question_keeps_it(collect: Callable[..., list[str]]) -> None:
    with hostile_server() as server:
        collect(server)
        teachers = [Teacher(n, model=n, base_url=server.url) for n in "ab"]
    plans = [(t, plan(t, load_questions("questions.jsonl"))) for t in teachers]
    known = {plans[1][1][5].key}
    left = routed(plans, {"q0"}, {f"q{i}": "a" for i in range(1, 10)}, known)
    asked = Counter(
        (item.problem.question_id, teacher.name) for teacher, items in left for item in items
    )
    assert asked["q0", "a"] == asked["q0", "b"] == 1
    assert asked["q5", "b"] == 1 and ("q5", "a") not in asked
    assert asked["q6", "a"] == 1 and ("q6", "b") not in asked
    assert len(asked) == 2 + 9
