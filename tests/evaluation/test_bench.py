"""The bench: measures by hand, and the command on a tiny student, killed and resumed."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from compact import register_metric
from compact.commands.cli import main
from compact.data.labelled import load_labelled
from compact.evaluation.bench.measures import (
    bootstrap_interval,
    localisation,
    mass,
    measure,
    within,
)
from compact.evaluation.bench.texts import judge_texts
from compact.lab.zoo import make_rows
from compact.registry import IMPORT_VARIABLE
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


def test_rows_of_other_metrics_are_not_taken_over(
    place: Path, own_registries: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metric that is added later has no scores in the rows."""
    assert main(["metrics", "zoo.jsonl", "--model", "student", "--out", "out", "--limit", "2"]) == 0

    @register_metric("mine", axis="control")
    def mine(pass_: Any) -> Any:
        return pass_.batch.token_offsets.diff().float()

    assert run("--limit", "2") == 1
    assert "other settings (metric mine was None, now True)" in capsys.readouterr().err


def test_rows_of_a_metric_that_was_edited_are_not_taken_over(
    place: Path,
    own_registries: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(IMPORT_VARIABLE, "scores_of_test_bench")
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = place / "scores_of_test_bench.py"
    module.write_text(
        "from compact import register_metric\n\n\n"
        "@register_metric('of_test_bench', axis='control')\n"
        "def longest(pass_):\n    return pass_.batch.token_offsets.diff().float()\n"
    )
    assert run("--only", "of_test_bench") == run("--only", "of_test_bench") == 0
    module.write_text(module.read_text() + "\n# edited\n")
    assert run("--only", "of_test_bench") == 1
    assert "other settings (imports was {'scores_of_test_bench'" in capsys.readouterr().err
    (place / "out/zoo.jsonl").unlink()
    assert run("--only", "nll") == 0
    module.write_text(module.read_text() + "\n# again\n")
    assert run("--only", "nll") == 0  # it comes from here


def test_files_to_write_are_checked_before_the_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data, which lie where the rows would go, are not to be deleted."""
    monkeypatch.setattr("compact.evaluation.bench.run.load_labelled", None)
    command = ["metrics", "zoo.jsonl", "--model", "student", "--out"]
    assert main([*command, "."]) == 1
    error = capsys.readouterr().err
    assert "--out must be another file than the input files, got zoo.jsonl" in error
    (place / "out").mkdir()
    (place / "out/bench.csv").write_text("mine")
    assert main([*command, "out"]) == 1
    assert "out/bench.csv: exists, and compact did not make it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "robst"), "--only must name some of"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--part", "3/2"), "--part must be k/N"),
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
    assert not any("[R]" in line for line in lines.values())  # sentences, no code
    assert "rise of the gold answer's likelihood over a text." in lines["answer-gain-net"]


def test_options_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("limit", "3"), ("part", "1/2"), ("max_length", "9")):
        assert main(["metrics", f"--{name}", value]) == 1
        assert f"--{name} must be used with DATA, got no file" in capsys.readouterr().err
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
    assert main(["metrics", "zoo.jsonl", "--out", "texts", "--max_length", "99"]) == 1
    assert "--max_length must be used with --model" in capsys.readouterr().err


def test_answer_vote_is_even_where_no_answer_is_read(place: Path) -> None:
    """As the policy is: no rationale has more votes than another."""
    rows = [
        {"question_id": "q", "prompt": "Why?", "answer": "7", "teacher": t, "completion": words}
        for t, words in (("a", "Nobody knows."), ("b", "Who could say?"))
    ]
    rows += [row | {"question_id": "p", "completion": f"The answer is {n}."}
             for row, n in zip(rows, (7, 8), strict=True)]  # fmt: skip
    rows += [rows[-1] | {"teacher": "c", "completion": "The answer is 8"}]
    found = judge_texts(*load_labelled(rows), "name")
    weights = [[r["weights"]["answer-vote"] for r in row["rationales"]] for row in found]
    assert weights == [[1.0, 1.0], [0.0, 1.0, 1.0]]
