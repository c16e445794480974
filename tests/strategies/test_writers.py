"""The builders with a teacher of teachers.yaml as their writer, behind a server of the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compact.data import Problem, load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.strategies.aqg import KINDS, QuestionGraphs, make_problems
from compact.strategies.building import Rows
from compact.strategies.orion import Orion
from compact.strategies.p_align import PrefixAlign
from compact.student import Student
from helpers.hostile_server import HostileServer, hostile_server
from helpers.trajectories import TEACHERS, rows_of, train


@pytest.fixture
def student() -> Student:
    tokenizer = build_tokenizer()
    return Student.of(build_model(tokenizer, 0, hidden=16, layers=1).eval(), tokenizer)


@pytest.fixture
def problems() -> dict[str, Problem]:
    return {str(p.prompt): p for p in load_problems(rows_of("good", "verbose", problems=6))}


def writer_of(server: HostileServer, folder: Path) -> str:
    entry = {"name": "writer", "model": "m", "base_url": server.url, "max_tokens": 50}
    (folder / "teachers.yaml").write_text(yaml.safe_dump([entry]))
    return f"{folder / 'teachers.yaml'}:writer"


def asked_for(text: str, problems: dict[str, Problem]) -> Problem:
    (found,) = [p for prompt, p in problems.items() if prompt in text]
    return found


def test_orion_with_an_endpoint(
    student: Student, problems: dict[str, Problem], tmp_path: Path
) -> None:
    """Half of the questions are rewritten well; the others keep their rationales."""
    of_id = {p.question_id: i for i, p in enumerate(problems.values())}

    def write(_: str, text: str) -> str:
        problem = asked_for(text, problems)
        assert "Wrong attempts of a student:" in text
        right = of_id[problem.question_id] % 2
        return f"New. The answer is {problem.answer if right else 98}"

    with hostile_server(write=write, faults=0.2, kinds=["500"]) as server:
        orion = Orion(writer_of(server, tmp_path), samples=1, max_new_tokens=3)
        built = orion.built(list(problems.values()), student)
        asked = server.requests
        assert (
            Orion(writer_of(server, tmp_path), samples=1, max_new_tokens=3).built(
                list(problems.values()), student
            )
            == built
        )
        assert server.requests == asked and server.repeated == 0
    for problem in problems.values():
        texts, counts = built[problem.question_id]
        if of_id[problem.question_id] % 2:
            assert texts == [f"New. The answer is {problem.answer}"] * 2
        else:
            assert texts == [None, None]
            assert counts["rewritten but wrong"] == 2


@pytest.mark.parametrize("judge", ["asked", "reaches"])
def test_p_align_with_an_endpoint(
    student: Student, problems: dict[str, Problem], tmp_path: Path, judge: str
) -> None:
    """Two lines are enough for the writer, which continues from there."""

    def lines(text: str) -> int:
        beginning = re.search(r"solution:\n(.*?)\n\n", text, re.DOTALL)
        assert beginning
        return 0 if beginning[1] == "(nothing yet)" else len(beginning[1].split("\n"))

    def write(_: str, text: str) -> str:
        if "Answer yes or no" in text:
            return "Yes." if lines(text) >= 2 else "No."
        assert "Continue this solution" in text
        answer = asked_for(text, problems).answer if lines(text) >= 2 else 98
        return f"So it is.\nThe answer is {answer}"

    with hostile_server(write=write) as server:
        align = PrefixAlign(judge, writer=writer_of(server, tmp_path), search="all")
        built: dict[str, Rows] = align.built(list(problems.values()), student)
        assert server.repeated == 0
    for problem in problems.values():
        texts, counts = built[problem.question_id]
        for text, rationale in zip(texts, problem.rationales, strict=True):
            prefix, end = text.split("\nSo it is.\n")
            assert str(rationale.completion).startswith(prefix) and prefix.count("\n") == 1
            assert end == f"The answer is {problem.answer}"
        assert counts["prefixes kept"] == 2 and counts["not monotone"] == 0


def test_aqg_with_an_endpoint(tmp_path: Path) -> None:
    """One wording loses a number, one misleads the writer, the others are kept."""
    plain = {str(p.prompt): p for p in make_problems(8, 0, KINDS, 3, 3)}
    lost, misleading = list(plain)[:2]

    def write(_: str, text: str) -> str:
        problem = asked_for(text, plain)
        if "in other words" in text:
            said = f"Look. {problem.prompt}"
            return re.sub(r"\d+", "some", said) if problem.prompt == lost else f'"{said}"'
        assert text.startswith("Look.")
        return f"The answer is {99999 if problem.prompt == misleading else problem.answer}"

    with hostile_server(write=write) as server:
        strategy = QuestionGraphs(count=8, writer=writer_of(server, tmp_path))
        found = strategy.prepare([], None, None)  # type: ignore[arg-type]
        assert server.requests == 8 + 7
        log = strategy.take_log()
    assert [str(p.prompt) for p in found[:2]] == [lost, misleading]
    assert [str(p.prompt) for p in found[2:]] == [f"Look. {text}" for text in list(plain)[2:]]
    assert [p.rationales for p in found] == [p.rationales for p in plain.values()]
    assert log["worded"] == 6 and log["worded but wrong"] == 2


def test_a_run_with_an_endpoint(tmp_path: Path) -> None:
    """Another run, with another seed, asks nothing again; the log says what was done."""
    rows = rows_of(*TEACHERS, problems=2)
    problems = {str(p.prompt): p for p in load_problems(rows)}

    def write(_: str, text: str) -> str:
        return f"So. The answer is {asked_for(text, problems).answer}"

    with hostile_server(write=write) as server:
        options = {"writer": writer_of(server, tmp_path), "samples": 1, "level": 1e-9}
        settings: dict[str, Any] = {"strategy": "p-align", "strategy_options": options}
        train(tmp_path / "a", rows, **settings)
        asked = server.requests
        train(tmp_path / "b", rows, **settings, learning_rate=1e-4)
        assert 0 < asked == server.requests
    log = json.loads((tmp_path / "a/trainer_state.json").read_text())["log_history"]
    assert log[0]["strategy/prefixes kept"] == 6


@pytest.mark.parametrize("make", [Orion, PrefixAlign, QuestionGraphs])
def test_a_budget_needs_an_endpoint(make: Any) -> None:
    with pytest.raises(ValueError, match="budget of .* must stand with"):
        make(budget=1.0)
