"""The bench: measures by hand, and the command on a tiny student, killed and resumed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from compact.commands.cli import main
from compact.evaluation.bench.measures import (
    bootstrap_interval,
    localisation,
    mass,
    measure,
    within,
)
from compact.lab.zoo import make_rows
from helpers.toy import save_student


def test_auc_within_a_question_by_hand() -> None:
    scores = [[3.0, 1.0, 2.0], [1.0, 1.0], [5.0, 4.0], [1.0, 2.0]]
    right = [[True, False, False], [True, False], [True, True], [None, True]]
    found = within(scores, right)
    assert found.value == pytest.approx((1.0 + 0.5) / 2)
    assert found.number == 2 and found.low <= found.value <= found.high
    assert math.isnan(within([[1.0]], [[True]]).value)


def test_mass_by_hand() -> None:
    weights = [[0.2, 0.3, 0.5], [0.4, 0.6], [0.0, 0.0]]
    right = [[True, True, False], [False, False], [True, False]]
    found = mass(weights, right)  # the second has no right one, the third no weight
    assert found.value == pytest.approx(0.5) and found.number == 1


def test_an_interval_narrows_with_the_number_of_questions() -> None:
    few, many = bootstrap_interval([0.0, 1.0] * 5), bootstrap_interval([0.0, 1.0] * 500)
    assert many.high - many.low < 0.3 * (few.high - few.low)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.5], 0.0, 1.0),  # one question says nothing
        ([1.0] * 20, 0.05 ** (1 / 20), 1.0),  # the rule of three
        ([0.5] * 20, 0.5 - (1 - 0.05 ** (1 / 20)), 0.5 + (1 - 0.05 ** (1 / 20))),
    ],
)
def test_equal_values_have_an_interval(values: list[float], low: float, high: float) -> None:
    found = bootstrap_interval(values)
    assert (found.value, found.number) == (values[0], len(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def rationale(teacher: str, right: bool, value: float, steps: list[dict[str, Any]]) -> dict:
    return {
        "teacher": teacher,
        "right": right,
        "states_gold": right,
        "tokens": 10 * (1 + ord(teacher) - ord("a")),
        "scores": {"good": value, "length": float(ord(teacher))},
        "axes": {},
        "blind": {"validity": 1.0, "agreement": 1.0},
        "weights": {"uniform": 0.5},
        "steps": steps,
    }


def step(right: bool | None, equations: float, surprise: float) -> dict[str, Any]:
    return {
        "right": right,
        "equations": equations,
        "surprise": surprise,
        "suspicion": equations or surprise,
        "length": 1.0,
        "gain": 0.0,
    }


ROWS = [
    {
        "question_id": str(q),
        "rationales": [
            rationale("a", True, 2.0, []),
            rationale("b", False, 1.0, [step(True, 0, 1), step(False, 0, 3), step(None, 1, 0)]),
        ],
    }
    for q in range(40)
]


def test_measures_of_rows() -> None:
    found = {c.name: c for c in measure(ROWS)}
    assert found["uniform"].mass.value == 0.5 and found["good"].mass.number == 0
    assert found["good"].auc.value == 1.0 and found["good"].kind == "metric"
    assert found["length"].auc.value == 0.0 and found["length"].length == 1.0
    assert found["uniform"].auc.value == 0.5 and found["uniform"].kind == "policy"
    assert found["good"].teachers == 1.0 and found["length"].teachers == -1.0
    assert found["good"].stability == {10: 1.0, 30: 1.0}
    places = localisation(ROWS)
    assert places["surprise"].value == 1.0
    assert places["equations"].value == 0.0
    assert places["length"].value == 0.0  # a tie goes to the first step
    assert places["chance"].value == pytest.approx(1 / 3)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_student(Path("student"))
    rows = make_rows(("good", "wrong-step", "unrelated"), 5, seed=1)
    for row in rows:
        row["right"] = row["teacher"] == "good"
        row["steps"] = [{"text": row["completion"], "right": row["right"]}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "zoo.jsonl").write_text(text)
    return tmp_path


def test_the_zoos_are_data_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "zoo-b", "zoo-c", "--limit", "20", "--out", "out"]) == 0
    table = list(csv.DictReader((place / "out/bench.csv").open()))
    mass = {(r["data"], r["score"]): float(r["value"]) for r in table if r["measure"] == "mass"}
    assert mass["zoo-b", "rejection"] == 1.0 and mass["zoo-b", "answer-vote"] == 0.0
    assert 0.5 < mass["zoo-c", "rejection"] < 1.0  # wrong steps may end in the right answer
    auc = {(r["data"], r["score"]): float(r["value"]) for r in table if r["measure"] == "auc"}
    assert auc["zoo-c", "judged"] > auc["zoo-c", "rejection"]


def test_scores_of_one_name_and_two_kinds(place: Path) -> None:
    assert run("--only", "random") == 0
    table = list(csv.DictReader((place / "out/bench.csv").open()))
    kinds = [r["kind"] for r in table if r["score"] == "random" and r["measure"] == "auc"]
    assert sorted(kinds) == ["metric", "policy"]


def run(*options: str) -> int:
    return main(["metrics", "zoo.jsonl", "--model", "student", "--out", "out", *options])


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    page = (place / "out/bench.md").read_text()
    assert capsys.readouterr().out.startswith(page[:200])
    table = list(csv.DictReader((place / "out/bench.csv").open()))
    auc = {row["score"]: float(row["value"]) for row in table if row["measure"] == "auc"}
    assert auc["robust"] == auc["rejection"] == 1.0
    assert auc["uniform"] == 0.5
    assert {"released", "paper", "robust without gold", "answer-vote", "rsr", "lark"} <= set(auc)
    assert {"judged without gold", "agreement without gold"} <= set(auc)
    assert auc["agreement without gold"] < auc["agreement"]
    assert (place / "out/bench.png").read_bytes()[:4] == b"\x89PNG"
    assert len((place / "out/zoo.jsonl").read_text().splitlines()) == 5


def test_a_killed_bench_resumes_to_the_same_page(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--only", "robust", "rejection", "nll", "gain")
    assert run(*only) == 0
    page, rows = (place / "out/bench.md").read_text(), (place / "out/zoo.jsonl").read_text()
    for name in ("bench.md", "bench.csv", "bench.png"):
        (place / "out" / name).unlink()
    (place / "out/zoo.jsonl").write_text("\n".join(rows.splitlines()[:2]) + '\n{"question')
    assert run(*only) == 0
    assert (place / "out/bench.md").read_text() == page
    assert run("--only", "robust") == 1  # rows of other settings are refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "robst"), "--only must name some of"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--part", "3/2"), "--part must be I/N"),
        (("--part", "9/9999"), "part 9/9999 has no question"),
    ],
)
def test_what_is_refused(
    place: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 1
    assert message in capsys.readouterr().err


def test_the_list_says_what_reads_gold_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert all("gold if given" in lines[name] for name in ("agreement", "judged"))
    assert "gold answers" in lines["gold-weighted"] and "free" in lines["step-graph"]


def test_options_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--limit", "3"]) == 1
    assert "--limit must be used with DATA" in capsys.readouterr().err
    assert main(["metrics", "x.jsonl"]) == 1
    assert "--out must be given with DATA" in capsys.readouterr().err


def test_without_a_student(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "zoo.jsonl", "--out", "texts"]) == 0
    assert "No student: scores of the texts." in capsys.readouterr().out
    table = list(csv.DictReader((place / "texts/bench.csv").open()))
    auc = {row["score"]: float(row["value"]) for row in table if row["measure"] == "auc"}
    assert auc["judged"] == auc["rejection"] == 1.0
    assert {"judged without gold", "answer", "answer-vote", "agreement"} <= set(auc)
    assert "agreement without gold" in auc
    places = {row["score"] for row in table if row["measure"] == "first_wrong_step"}
    assert places == {"equations", "length", "chance"}
    assert main(["metrics", "zoo.jsonl", "--out", "texts", "--only", "robust"]) == 1
