"""Training, scoring and the report on data where some or all problems have no gold answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.commands.cli import main
from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer import CompactTrainer
from compact.trainer.runlog import read_scores
from helpers.commands import fails
from helpers.toy import save_student
from helpers.trajectories import TEACHERS, WEIGHED, rows_of, train

GOLD_FREE: dict[str, Any] = {"preset": "paper", "overrides": {"adaptability": "none"}}


def without_answers(rows: list[dict[str, str]], *kept: int) -> list[dict[str, str]]:
    """The rows without their answers, except those of the problems with the indices `kept`."""
    questions = list(dict.fromkeys(row["question_id"] for row in rows))
    having = {questions[i] for i in kept}
    return [
        {k: v for k, v in row.items() if k != "answer" or row["question_id"] in having}
        for row in rows
    ]


def assert_same(one: Any, two: Any) -> None:
    """Compares two outcomes of `train`."""
    assert one[0] == pytest.approx(two[0], abs=1e-4)
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("weighing", [{"preset": "uniform"}, GOLD_FREE], ids=["uniform", "paper"])
def test_what_reads_no_gold_answer_trains_the_same(
    tmp_path: Path, weighing: dict[str, Any]
) -> None:
    rows = rows_of(*TEACHERS)
    known = train(tmp_path / "known", rows, **weighing)
    unknown = train(tmp_path / "unknown", without_answers(rows), **weighing)
    assert_same(known, unknown)
    assert len(read_scores(tmp_path / "unknown")) == 2 * 4 * 3


@pytest.mark.parametrize("leaf_every", [1, 2])
@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_mixed_data_train_the_same_in_any_split(
    tmp_path: Path, layout: str, leaf_every: int
) -> None:
    rows = without_answers(rows_of(*TEACHERS), 0, 3)
    settings = WEIGHED | {"layout": layout, "leaf_every": leaf_every, "max_steps": 3}
    whole = train(tmp_path / "whole", rows, **settings)
    split = train(
        tmp_path / "split",
        rows,
        **settings,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert_same(whole, split)
    table = read_scores(tmp_path / "whole").to_pylist()
    scored = {row["question_id"] for row in table if row["adaptability"]}
    assert scored == {row["question_id"] for row in rows if "answer" in row}


def trainer(folder: Path, rows: list[dict[str, str]], **settings: Any) -> CompactTrainer:
    tokenizer = build_tokenizer()
    values = {"output_dir": str(folder), "max_length": 400, "use_cpu": True, "report_to": "none"}
    values |= {"disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    return CompactTrainer(
        build_model(tokenizer, seed=0, layers=1),
        CompactConfig(**values | settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def test_gold_logp_is_a_mean_over_the_problems_that_have_gold(tmp_path: Path) -> None:
    rows = rows_of(*TEACHERS)
    found = []
    for some in (rows, without_answers(rows, 0, 2), without_answers(rows, 2)):
        run = trainer(tmp_path, some, preset="robust", per_device_eval_batch_size=2)
        found.append(run.evaluate()["eval_gold_logp"])
    assert len({round(value, 6) for value in found}) == 3 and all(value < -1 for value in found)
    questions = list(dict.fromkeys(row["question_id"] for row in rows))
    each = []
    for question in (questions[0], questions[2]):
        mine = [row for row in rows if row["question_id"] == question]
        each.append(trainer(tmp_path, mine, preset="robust").evaluate()["eval_gold_logp"])
    assert found[1] == pytest.approx(sum(each) / 2, abs=1e-4)
    assert found[2] == pytest.approx(each[1], abs=1e-4)


def test_rejection_trains_on_what_it_can_judge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(*TEACHERS)
    some = train(tmp_path / "some", without_answers(rows, 1, 2), preset="rejection")
    assert "rejection: 2 of 4 problems have no gold answer" in caplog.text
    weights = read_scores(tmp_path / "some").to_pylist()
    judged = {row["question_id"] for row in weights if row["weight"]}
    assert judged == {row["question_id"] for row in without_answers(rows, 1, 2) if "answer" in row}
    kept = [row for row in rows if row["question_id"] in judged]
    only = train(tmp_path / "only", kept, preset="rejection", per_device_train_batch_size=2)
    assert_same(some, only)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Score, train and report without gold answers; a preset that needs them is refused."""
    student, data, run = tmp_path / "student", tmp_path / "data.jsonl", tmp_path / "run"
    save_student(student)
    rows = without_answers(rows_of("good", "wrong-step"), 1)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.jsonl"
    score = ["score", str(data), "--model", str(student), "--out", str(out)]
    assert main([*score, "--preset", "paper", "--max_length", "400"]) == 0
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["adaptability"] != 0 for row in scored] == ["answer" in row for row in rows]
    asked = [any(step["gain"] is not None for step in row["steps"]) for row in scored]
    assert asked == ["answer" in row for row in rows]
    assert all(row["answer"] is not None for row in scored)

    settings = ["--output_dir", str(run), "--max_length", "400", "--use_cpu", "--use_peft", "false"]
    settings += ["--num_train_epochs", "1", "--report_to", "none"]
    command = ["train", "--model", str(student), "--data", str(data), *settings]
    assert main([*command, "--preset", "answer-vote"]) == 0
    page = tmp_path / "page.html"
    chosen = list(dict.fromkeys(row["question_id"] for row in rows))[:2]
    assert main(["report", str(run), "--question_id", *chosen, "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("No gold answer in the data") == 1 and text.count("Gold answer <b>") == 1
    assert text.count("Level after each step") == 1 and text.count("Consensus graph</b>") == 2

    data.write_text("".join(json.dumps(row) + "\n" for row in without_answers(rows)))
    capsys.readouterr()
    command[command.index(str(run))] = str(tmp_path / "other")
    for refused in ([*score, "--preset", "paper"], [*command, "--preset", "paper"]):
        words = "probe of paper needs gold answers, and no row of the data has the field 'answer'"
        assert words in fails(capsys, *refused)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {student}\n")
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows_of("good")))
    arms = ["compare", str(data), "--config", str(recipe), "--test", str(test)]
    arms += ["--out", str(tmp_path / "arms")]
    assert "rejection needs gold answers" in fails(capsys, *arms, "--arms", "uniform", "rejection")
    assert all(p.answer is None for p in load_problems(data))
