"""Tasks: rounds of several problems in one, and a teacher whose answers are paid once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compact.teachers.tasks import Task, Work, find_writer, work_off
from helpers.hostile_server import hostile_server

Write = Callable[..., Path]


def until_yes(rounds: int) -> Work[int]:
    """Asks one task more in each round."""
    heard = 0
    for count in range(1, rounds + 1):
        found = yield [Task(f"{rounds} {i}", lambda t: t if "yes" in t else None)
                       for i in range(count)]  # fmt: skip
        heard += sum(text is not None for text in found)
    return heard


def test_rounds_are_shared_and_the_first_sample_that_is_read_counts() -> None:
    asked: list[Sequence[str]] = []

    def write(prompts: Sequence[str]) -> list[list[str]]:
        asked.append(prompts)
        return [["no", "yes"] if prompt.endswith("0") else [] for prompt in prompts]

    assert work_off({"a": until_yes(3), "b": until_yes(1), "c": until_yes(0)}, write) == {
        "a": 3,
        "b": 1,
        "c": 0,
    }
    assert [len(prompts) for prompts in asked] == [2, 2, 3]


def test_a_teacher_is_paid_once(teachers: Write) -> None:
    with hostile_server(faults=0.3, kinds=["500", "empty content"], seed=2) as server:
        path = teachers({"name": "a", "model": "m", "base_url": server.url, "n": 2, "system": "s"})
        writer = find_writer(f"{path}:a")
        assert writer.at_once == 8 and writer.settings["model"] == "m"
        prompts = ["1 + 2", "3 + 4", "1 + 2"]
        found = writer.write(prompts)
        assert [len(samples) for samples in found] == [2, 2, 2] and found[0] == found[2]
        assert found[1][0].startswith("3 and 4 make")
        assert set(server.answered.values()) == {2}
        assert server.bodies[0]["messages"][0] == {"role": "system", "content": "s"}
        asked = server.requests
        assert find_writer(f"{path}:a").write(prompts) == found and server.requests == asked
    assert path.with_suffix(".sqlite").exists()


def test_cut_answers_are_left_out(teachers: Write) -> None:
    with hostile_server(cut=1.0) as server:
        entry = {"model": "m", "base_url": server.url}
        path = teachers(
            {"name": "a", **entry}, {"name": "b", **entry, "keep_cut": True, "top_p": 1}
        )
        assert find_writer(f"{path}:a").write(["1 + 2"]) == [[]]
        assert len(find_writer(f"{path}:b").write(["1 + 2"])[0]) == 1


def test_the_budget_stops_the_work(teachers: Write) -> None:
    with hostile_server() as server:
        entry = {"name": "a", "model": "m", "base_url": server.url, "max_tokens": 10}
        path = teachers({**entry, "price": {"out": 1e6}})
        with pytest.raises(ValueError, match="writer a: 1 of 2 requests have no answer .*budget"):
            find_writer(f"{path}:a", budget=15.0).write(["1 + 2", "3 + 4"])
        assert server.requests == 1
    with sqlite3.connect(path.with_suffix(".sqlite")) as database:
        assert database.execute("SELECT sum(cost) FROM attempts").fetchone() == (10.0,)


@pytest.mark.parametrize(
    "text, words",
    [
        ("teachers.yaml:no", "must be a teacher of .*got 'no': a"),
        ("no_such_module:write", "must be student, FILE.yaml:TEACHER or MODULE:FUNCTION"),
        ("me", "must be student, FILE.yaml:TEACHER or MODULE:FUNCTION"),
    ],
)
def test_who_is_no_writer(
    teachers: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    teachers({"name": "a", "model": "m", "base_url": "http://127.0.0.1:1/v1"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        find_writer(text)
    with pytest.raises(ValueError, match="budget must stand with a writer FILE.yaml:TEACHER"):
        find_writer("json:dumps", budget=1.0)
