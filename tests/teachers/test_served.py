"""A real server (`transformers serve`), a model in this process, the way to a trained student."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compact.commands.cli import main
from compact.data import load_problems
from compact.lab import zoo
from compact.teachers.pace import Patience
from helpers.commands import fails
from helpers.hostile_server import hostile_server
from helpers.serving import free_port, save_talking_student, served

ROOT = Path(__file__).parents[2]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_talking_student(folder)
    return folder


def write_zoo(path: Path, count: int, *, gold: bool = True) -> None:
    """Questions of the zoo, which the student's tokenizer knows."""
    rows = zoo.make_rows(("good",), count, seed=2)
    kept = ("question_id", "prompt", "answer")[: 2 + gold]
    path.write_text("".join(json.dumps({k: row[k] for k in kept}) + "\n" for row in rows))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_real_server_and_the_student_that_it_serves(
    student: Path, tmp_path: Path, teachers: Write
) -> None:
    """`collect` and `evaluate --endpoint` ask the same server."""
    questions, out = tmp_path / "questions.jsonl", tmp_path / "rationales.jsonl"
    write_zoo(questions, 4)
    with served(student, tmp_path / "serve.log") as url:
        entry = {"model": str(student), "base_url": url, "max_tokens": 64, "keep_cut": True}
        teachers({"name": "cool", "temperature": 0.2, **entry},
                 {"name": "warm", "temperature": 0.9, "n": 2, **entry})  # fmt: skip
        words = [str(questions), "--teachers", str(tmp_path / "teachers.yaml"), "--out", str(out)]
        assert main(["collect", *words]) == 0
        answers = tmp_path / "served.jsonl"
        words = ["--model", str(student), "--data", str(questions), "--max_new_tokens", "64"]
        assert main(["evaluate", "--endpoint", url, *words, "--out", str(answers)]) == 0
    assert {row["teacher"] for row in rows_of(out)} == {"cool", "warm#1", "warm#2"}  # they differ
    assert len(load_problems(out)) == 4
    account = json.loads(out.with_name("rationales.summary.json").read_text())["teachers"]["warm"]
    assert account["answers"] == account["requests"] == 8 and account["completion_tokens"] > 8
    # The server answers as the student does here.
    own = tmp_path / "own.jsonl"
    assert main(["evaluate", *words, "--out", str(own)]) == 0
    for here, there in zip(
        sorted(rows_of(own), key=lambda row: row["question_id"]),
        sorted(rows_of(answers), key=lambda row: row["question_id"]),
        strict=True,
    ):
        assert here["question_id"] == there["question_id"] and here.keys() == there.keys()
        assert here["completion"] == there["completion"]
    assert not answers.with_suffix(".sqlite").exists()


def test_a_local_teacher(student: Path, tmp_path: Path, teachers: Write) -> None:
    """Its samples depend on the request and the sample's number only."""
    questions = tmp_path / "questions.jsonl"
    write_zoo(questions, 2)
    teachers(
        {
            "name": "here",
            "local": str(student),
            "n": 2,
            "temperature": 0.9,
            "max_tokens": 48,
            "keep_cut": True,
        }  # fmt: skip
    )
    found = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.jsonl"
        words = [str(questions), "--teachers", str(tmp_path / "teachers.yaml"), "--out", str(out)]
        assert main(["collect", *words]) == 0
        found.append(rows_of(out))
    assert found[0] == found[1] and len(load_problems(found[0])) == 2


def test_a_server_that_fails_is_evaluated_again(tmp_path: Path, questions: Write) -> None:
    out = tmp_path / "served.jsonl"
    words = ["evaluate", "--model", "m", "--data", str(questions(30)), "--out", str(out)]
    with hostile_server(key="k") as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TEST_SERVED_KEY", "wrong")
            assert main([*words, "--endpoint", server.url, "--api_key_env", "TEST_SERVED_KEY"]) == 1
            patch.setenv("TEST_SERVED_KEY", "k")
            assert main([*words, "--endpoint", server.url, "--api_key_env", "TEST_SERVED_KEY"]) == 0
            asked = server.requests
            assert main([*words, "--endpoint", server.url, "--api_key_env", "TEST_SERVED_KEY"]) == 0
        assert server.requests == asked == 30
    summary = json.loads((tmp_path / "served.summary.json").read_text())
    assert summary["items"] == 30 and 0.5 < summary["accuracy"] < 1


def test_what_is_empty_or_refused_is_wrong(
    tmp_path: Path, questions: Write, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "served.jsonl"
    words = ["evaluate", "--model", "m", "--data", str(questions(20)), "--out", str(out)]
    kinds = ["too long", "null content"]
    with (
        hostile_server(faults=0.5, kinds=kinds, seed=3) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("compact.teachers.collect.Patience", partial(Patience, attempts=1))
        assert main([*words, "--endpoint", server.url]) == 0
        refused, empty = (server.given[kind] for kind in kinds)
    assert refused and empty and f"{refused} questions were refused" in caplog.text
    rows = rows_of(out)
    assert len(rows) == 20 and sum(row["completion"] == "" for row in rows) >= refused + empty
    assert not any(row["correct"] for row in rows if row["completion"] == "")


@pytest.mark.parametrize("option", ["--adapter", "--base", "--retained", "--retained_task"])
def test_an_endpoint_has_no_weights(
    tmp_path: Path, questions: Write, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    words = ["--model", "m", "--data", str(questions(1)), "--out", str(tmp_path / "o.jsonl")]
    other = tmp_path / "other.jsonl"
    other.write_text(questions(1).read_text())
    line = fails(
        capsys, "evaluate", "--endpoint", "http://127.0.0.1:1/v1", *words, option, str(other)
    )
    assert f"{option} must not be given with --endpoint" in line


@pytest.mark.slow
def test_the_recipe_from_questions_to_a_student(student: Path, tmp_path: Path) -> None:
    """recipes/collect/run.sh: collect, score, train, evaluate.

    Its teacher is a random model, which is never right: without gold answers nobody can tell.
    """
    write_zoo(tmp_path / "questions.jsonl", 30, gold=False)
    write_zoo(tmp_path / "test.jsonl", 4)
    scripts = Path(sys.executable).parent
    settings = {"PORT": str(free_port()), "TOKENS": "64", "STEPS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [ROOT / "recipes/collect/run.sh", student, "questions.jsonl", "test.jsonl", "out"],
        cwd=tmp_path,
        env={**os.environ, **settings, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    rows = rows_of(out / "rationales.jsonl")
    texts: dict[str, set[str]] = {"cool": set(), "warm": set()}
    for row in rows:
        texts[row["teacher"]].add(row["completion"])
    assert texts["cool"] and texts["warm"] - texts["cool"]  # the server draws samples
    scored = {(row["question_id"], row["teacher"]) for row in rows_of(out / "scores.jsonl")}
    assert scored == {(row["question_id"], row["teacher"]) for row in rows}
    assert json.loads((out / "run/run.json").read_text())["status"] == "complete"
    assert json.loads((out / "evaluate.summary.json").read_text())["items"] == 4
