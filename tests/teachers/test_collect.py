"""The loop against a hostile server: every answer once, whatever fails, whoever is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compact.data import load_problems, load_questions
from compact.teachers.collect import Plans, Result, collect, plan
from compact.teachers.export import find_rows, rows_of
from compact.teachers.ledger import ledger
from compact.teachers.pace import Patience
from compact.teachers.prompts import TEMPLATES
from compact.teachers.spec import Teacher
from compact.teachers.store import Store
from helpers.hostile_server import FAULTS, HostileServer, hostile_server

QUICK = Patience(attempts=20, first_wait=0.01, longest_wait=0.05, strikes=30)
Write = Callable[..., Path]


def teacher_of(server: HostileServer, name: str = "a", **keys: Any) -> Teacher:
    return Teacher(name, model=f"model-{name}", base_url=server.url, **{"timeout": 5.0, **keys})


def run(
    store: Store, questions: Path, *teachers: Teacher, **settings: Any
) -> tuple[Plans, dict[str, Result]]:
    plans = [(t, plan(t, load_questions(questions))) for t in teachers]
    return plans, collect(store, plans, **{"patience": QUICK, **settings})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.sqlite")


def test_200_requests_with_two_in_five_failing(store: Store, questions: Write) -> None:
    """Every answer once, nothing asked again after it, in a time that the faults explain."""
    settings: dict[str, Any] = {"seed": 3, "faults": 0.4, "hang": 3.0, "storms": [range(90, 130)]}
    with hostile_server(**settings) as server:
        teacher = teacher_of(server, concurrency=16, timeout=2.0)
        patience = replace(QUICK, strikes=60)  # a storm of 40, one request at a time
        started = time.monotonic()
        plans, results = run(store, questions(200), teacher, patience=patience)
        took = time.monotonic() - started
        assert results["a"].answered == 200 and results["a"].missing == 0
        assert len(server.answered) == 200 and set(server.answered.values()) == {1}
        assert server.repeated == 0
        assert set(server.given) == {*FAULTS, "ok"}  # each kind of fault was met
        assert server.requests == sum(server.given.values())
        assert took < 60 + 2.0 * server.given["hang"]
        requests = server.requests
        _, results = run(store, questions(200), teacher)  # once more: nothing to ask
        assert results["a"].answered == 200 and server.requests == requests
    found = find_rows(store, plans)
    rows = rows_of(found)
    assert len({row["question_id"] for row in rows}) == len(rows) == 200
    assert len(load_problems(rows)) == 200
    account = ledger(store, found)["a"]
    assert account["answers"] == 200 and account["requests"] == requests
    # A reset looks like a hang to no one, a hang like a timeout: each fault has its name.
    failures = account["failures"]
    assert failures["timeout"] >= server.given["hang"]
    assert failures["empty"] == server.given["null content"] + server.given["empty content"]
    marks = [row["mark"] for row in rows]
    assert account["right"] == marks.count("right") / 200
    assert 0.7 < account["right"] < 0.95 and "wrong" in marks


def test_concurrency_follows_what_the_endpoint_takes(store: Store, questions: Write) -> None:
    with hostile_server(storms=[range(8, 24)], delay=0.02) as server:
        _, results = run(store, questions(80), teacher_of(server, concurrency=8))
        assert results["a"].failures["rate limit"] == 16
        assert server.most <= 8 and server.repeated == 0


def test_requests_per_minute(store: Store, questions: Write) -> None:
    with hostile_server() as server:
        started = time.monotonic()
        run(store, questions(11), teacher_of(server, requests_per_minute=1200))
        assert time.monotonic() - started > 10 * 0.05


def test_a_dead_endpoint_costs_its_teacher_only(store: Store, questions: Write) -> None:
    with hostile_server() as dead:
        pass
    with hostile_server() as server, hostile_server(faults=1.0, kinds=["500"]) as broken:
        with hostile_server(key="secret") as locked:
            plans, results = run(
                store,
                questions(20),
                teacher_of(dead, "dead"),
                teacher_of(broken, "broken"),
                teacher_of(locked, "locked"),
                teacher_of(server, "well"),
            )
        assert locked.requests == 0
        assert broken.requests < 200
    assert results["well"].answered == 20 and results["well"].reason is None
    for name in ("dead", "broken", "locked"):
        assert results[name].missing == 20 and results[name].reason
    assert "401" in (results["locked"].reason or "")
    assert {row["teacher"] for row in rows_of(find_rows(store, plans))} == {"well"}
    with hostile_server() as server:  # at another address: the answers are the same ones
        _, results = run(store, questions(20), teacher_of(server, "dead"))
        assert results["dead"].answered == 20


def test_cut_answers_are_kept_and_left_out(store: Store, questions: Write) -> None:
    with hostile_server(cut=0.3) as server:
        teacher = teacher_of(server)
        plans, results = run(store, questions(40), teacher)
        assert results["a"].answered == server.requests == 40
    (found,) = find_rows(store, plans)
    assert 0 < found.cut < 40 and len(found.rows) == 40 - found.cut
    kept = replace(teacher, keep_cut=True)
    (found,) = find_rows(store, [(kept, plan(kept, load_questions(questions(40))))])
    assert len(found.rows) == 40


def test_samples_are_asked_each_and_identical_ones_merged(store: Store, questions: Write) -> None:
    with hostile_server() as server:
        plans, _ = run(store, questions(5), teacher_of(server, n=3, temperature=0.7))
        assert server.requests == 15
    (found,) = find_rows(store, plans)
    assert [row["teacher"] for row in found.rows] == ["a#1"] * 5 and found.merged == 10
    assert [row["count"] for row in found.rows] == [3] * 5


def test_what_is_sent(store: Store, questions: Write) -> None:
    """Sampling, extra fields and system message; one model is ten teachers by its templates."""
    drawn: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    with hostile_server() as server:
        more = {"min_p": 0.1, "chat": {"think": False}}
        teacher = teacher_of(server, extra_body=more, system="Be brief.", **drawn)
        run(store, questions(1), teacher)
        (body,) = server.bodies
        server.bodies.clear()
        run(store, questions(1), *(replace(teacher, name=t, template=t) for t in TEMPLATES))
        prompts = {b["messages"][1]["content"] for b in (body, *server.bodies)}
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.9, 7)
    assert (body["model"], body["min_p"], body["chat"]) == ("model-a", 0.1, {"think": False})
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(server.bodies) == 9 and len(prompts) == 10  # step-by-step had been asked


def test_the_budget_is_never_exceeded(store: Store, questions: Write) -> None:
    """Also while requests run at the same time; a free teacher goes on."""
    price = {"in": 1e6, "out": 1e6}  # a token costs 1, so an answer costs 30
    with hostile_server(delay=0.01) as server:
        dear = teacher_of(server, "dear", price=price, max_tokens=10)
        free = teacher_of(server, "free", price={"in": 0, "out": 0})
        plans, results = run(store, questions(80), dear, free, budget=2000.0)
    assert "budget" in (results["dear"].reason or "") and results["free"].missing == 0
    spent = ledger(store, find_rows(store, plans))["dear"]["cost"]
    at_most = plans[0][1][0].at_most
    assert 2000 - at_most < spent <= 2000 and spent == 30 * results["dear"].answered


def test_an_unlimited_answer_has_no_budget(store: Store, questions: Write) -> None:
    with hostile_server() as server:
        teacher = teacher_of(server, price={"out": 1.0}, max_tokens=None)
        with pytest.raises(ValueError, match="max_tokens must be given with a budget"):
            run(store, questions(1), teacher, budget=1.0)


def test_a_teacher_without_a_price_has_no_budget(store: Store, questions: Write) -> None:
    """It would be asked without limit, also beside one that has a price."""
    with hostile_server() as server:
        paid, unknown = teacher_of(server, price={"out": 1.0}), teacher_of(server, "unknown")
        with pytest.raises(
            ValueError, match="teacher 'unknown': price must be given with a budget"
        ):
            run(store, questions(1), paid, unknown, budget=1.0)
        assert server.requests == 0


def test_an_answer_that_takes_too_long_is_bought_three_times(
    store: Store, questions: Write, caplog: pytest.LogCaptureFixture
) -> None:
    def write(model: str, question: str) -> str:
        time.sleep(1.0 * (" 3 + " in question))
        return "The answer is 1"

    with hostile_server(write=write) as server:
        run(store, questions(1), teacher_of(server))  # the client loads its modules
        teacher = teacher_of(server, timeout=0.5)
        _, results = run(store, questions(6), teacher, patience=replace(QUICK, attempts=8))
    assert results["a"].answered == 5 and results["a"].failures == {"timeout": 3}
    assert caplog.text.count("raise the teacher's timeout") == 1


def test_inside_an_event_loop(store: Store, questions: Write) -> None:
    """As in a notebook."""

    async def cell() -> dict[str, Result]:
        return run(store, questions(3), teacher_of(server))[1]

    with hostile_server() as server:
        assert asyncio.run(cell())["a"].answered == 3


# --- killed and several processes -------------------------------------------------------------

_QUICK_FAULTS = [fault for fault in FAULTS if fault != "hang"]
COMMAND = [sys.executable, "-m", "compact", "collect"]


def command(folder: Path, name: str, **settings: str) -> list[str]:
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [
        *COMMAND,
        *(str(folder / "questions.jsonl"), "--teachers", str(folder / "teachers.yaml")),
        *("--out", str(folder / f"{name}.jsonl"), "--first_wait", "0.01", "--attempts", "20"),
        *words,
    ]


def whole(path: Path) -> bool:
    with sqlite3.connect(path) as database:
        return database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def killed(folder: Path, server: HostileServer, times: int, seed: int) -> None:
    """Kills a run at random moments, lets it end, and compares it with a run left alone."""
    draw = random.Random(seed)
    path = folder / "killed.sqlite"
    for _ in range(times):
        before = server.requests
        process = subprocess.Popen(command(folder, "killed"), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while server.requests == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert whole(path)
    done = subprocess.run(command(folder, "killed"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(command(folder, "alone"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "killed.jsonl").read_bytes() == (folder / "alone.jsonl").read_bytes()
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM claims").fetchone() == (0,)
        (lost,) = database.execute(
            "SELECT count(*) FROM attempts WHERE outcome = 'lost'"
        ).fetchone()
    # Only what was under way at a kill is asked twice.
    assert lost <= 8 * times
    twice = sum(count - 2 for count in server.answered.values())  # two runs
    assert 0 <= twice <= lost


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    tmp_path: Path, questions: Write, teachers: Write, times: int
) -> None:
    questions(60 * times)
    with hostile_server(seed=5, faults=0.2, kinds=_QUICK_FAULTS, delay=0.02) as server:
        entry = {"model": "m", "base_url": server.url, "timeout": 5.0}
        teachers({"name": "a", **entry})
        killed(tmp_path, server, times, seed=times)


def test_interrupted(tmp_path: Path, questions: Write, teachers: Write) -> None:
    """Ctrl-C ends with one line, and leaves no claim."""
    questions(200)
    with hostile_server(delay=0.05) as server:
        teachers({"name": "a", "model": "m", "base_url": server.url, "concurrency": 2})
        process = subprocess.Popen(command(tmp_path, "out"), stderr=subprocess.PIPE, text=True)
        while server.requests < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate()
    assert process.returncode == 130
    assert "error: interrupted; the answers so far are in" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    with sqlite3.connect(tmp_path / "out.sqlite") as database:
        assert database.execute("SELECT count(*) FROM claims").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM answers").fetchone()[0] > 0


def test_two_processes_share_a_store(tmp_path: Path, questions: Write, teachers: Write) -> None:
    questions(100)
    with hostile_server(delay=0.05) as server:
        teachers({"name": "a", "model": "m", "base_url": server.url, "concurrency": 2})
        path = str(tmp_path / "shared.sqlite")
        runs = [
            subprocess.Popen(command(tmp_path, name, store=path), stderr=subprocess.DEVNULL)
            for name in ("one", "two")
        ]
        assert [process.wait() for process in runs] == [0, 0]
        assert set(server.answered.values()) == {1} and server.repeated == 0
        assert server.most > 2  # both asked
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


# --- keys -------------------------------------------------------------------------------------


def test_no_key_anywhere(
    tmp_path: Path, questions: Write, teachers: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a file, nor in what is printed, nor in the list of processes."""
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_COLLECT_KEY", key)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    monkeypatch.setenv("TEST_OTHER_KEY", "sk-another-secret-987")
    questions(40)
    settings: dict[str, Any] = {"faults": 0.5, "kinds": ["500"], "delay": 0.02, "key": key}
    with hostile_server(**settings) as server:
        entry = {"base_url": server.url, "timeout": 5.0}
        teachers(
            {"name": "a", "model": "m", "api_key_env": "TEST_COLLECT_KEY", **entry},
            {"name": "refused", "model": "n", "api_key_env": "TEST_OTHER_KEY", **entry},
        )
        process = subprocess.Popen(
            command(tmp_path, "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while server.requests < 20:
            listed = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            time.sleep(0.02)
        printed = "".join(process.communicate())
    assert process.returncode == 1 and "refused was given up: status 401" in printed
    assert "collect" in listed.decode()
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert {"out.jsonl", "out.sqlite", "out.card.md"} <= {path.name for path in files}
    for secret in (key, os.environ["TEST_OTHER_KEY"]):
        assert secret not in printed and secret.encode() not in listed
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 40
