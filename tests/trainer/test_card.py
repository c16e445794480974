"""The model card of a run: what it says, when it is drawn anew, and that others' files are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from compact.commands.cli import main
from compact.config import CompactConfig
from compact.files import content_of_student
from compact.lab import zoo
from compact.trainer import CompactTrainer
from compact.trainer.card import card_of, exported_card
from compact.trainer.runlog import ScoreLog, read_scores
from helpers.toy import save_student


def trained(folder: Path, **settings: Any) -> CompactTrainer:
    save_student(folder / "student")
    data = folder / "rationales.jsonl"
    rows = zoo.make_rows(("good", "wrong-step"), 3, seed=2)
    for row in rows:
        row["teacher"] = {"good": "a|<b>", "wrong-step": "c"}[row["teacher"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"max_steps": 2, "max_length": 400, "report_to": "none"}
    values |= {"use_cpu": True, "disable_tqdm": True, "output_dir": str(folder / "run")}
    made = CompactTrainer(
        str(folder / "student"),
        CompactConfig(**values | settings),
        train_dataset=str(data),
        eval_dataset=str(data),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    made.train()
    made.save_model()
    return made


def test_what_the_card_says(tmp_path: Path) -> None:
    made = trained(tmp_path, eval_strategy="epoch", save_strategy="epoch")
    card = tmp_path / "run" / "README.md"
    text = card.read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"] == ["compact", "distillation"] and "base_model" not in head
    for words in (
        str(tmp_path / "student"),
        "| a\\|\\<b\\> | 3 | ",
        "| c | 3 | ",
        "library_name: peft",
        str(tmp_path / "rationales.jsonl"),
        "- eval\\_nll ",
        "- loss ",
        "- `preset`: robust",
        "transformers",
        "```bash",
    ):
        assert words in text.replace("\\_", "_") or words in text, words
    assert (tmp_path / "run" / "checkpoint-2" / "README.md").exists()
    answers = tmp_path / "run" / "test.jsonl"
    data = tmp_path / "rationales.jsonl"
    command = ["evaluate", "--model", tmp_path / "run", "--data", data, "--out", answers]
    assert main([*map(str, command), "--max_new_tokens", "2"]) == 0
    assert "rationales.jsonl: accuracy 0.000 (0 of 3, 95% interval 0.000 to " in card.read_text()
    mine = card.read_text() + "My own words."
    card.write_text(mine)  # the line of ours is still there
    made.create_model_card()
    assert "own words" not in card.read_text()
    card.write_text("My own words.")
    made.create_model_card()
    made.save_model()
    assert main([*map(str, command), "--max_new_tokens", "2"]) == 0
    assert card.read_text() == "My own words."


def test_a_readme_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text("Mine.")
    trained(tmp_path)
    assert (tmp_path / "run" / "README.md").read_text() == "Mine."
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_files_that_cannot_be_read_do_not_keep_a_student_from_being_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.summary.json").write_text("[]")
    trained(tmp_path)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "README.md").exists()
    assert "no model card: " in caplog.text and "mine.summary.json" in caplog.text


def test_only_accuracies_of_this_student_are_told(tmp_path: Path) -> None:
    """Not those of its base, of weights that it had before, or of a server."""
    run, base = tmp_path / "run", tmp_path / "base"
    for folder in (run, base):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(folder.name.encode() * 100)

    def evaluated(name: str, correct: int, **settings: Any) -> None:
        found = {"accuracy": correct / 100, "correct": correct, "items": 100}
        found |= {"ci_low": 0.0, "ci_high": 1.0, "status": "complete"}
        about = {"data": "x.jsonl", "model": str(base)} | settings
        (run / f"{name}.summary.json").write_text(json.dumps(found | {"settings": about}))

    own = content_of_student(run)
    evaluated("mine", 11, weights=own)
    evaluated("onto_base", 12, weights=content_of_student(base, run), adapter=str(run))
    evaluated("mine.old.base", 21, weights=content_of_student(base))
    evaluated("earlier", 22, weights="0" * 64)
    evaluated("served", 23)
    card = card_of(run).replace("\\_", "_")
    assert "- mine, on x.jsonl: accuracy 0.110" in card
    assert "- onto_base, on x.jsonl: accuracy 0.120" in card
    assert card.count("accuracy") == 2
    beside_another = card_of(run, base)  # as of a checkpoint
    assert "accuracy 0.210" in beside_another and beside_another.count("accuracy") == 1


def test_the_log_of_scores_is_not_read_at_each_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time would grow with the square of the run. What is in the files of the run is told."""
    read: list[Path] = []
    monkeypatch.setattr(
        "compact.trainer.card.read_scores", lambda run: (read.append(run), read_scores(run))[1]
    )
    trained(tmp_path, save_steps=1)
    assert read == [tmp_path / "run"]
    told = {name: tmp_path / "run" / name / "README.md" for name in ("checkpoint-2", ".")}
    cards = {name: path.read_text() for name, path in told.items()}
    assert "## Teachers" in cards["."] and "## Teachers" not in cards["checkpoint-2"]
    for words in (str(tmp_path / "student"), "rationales.jsonl", "- `preset`: robust", "```bash"):
        assert words in cards["checkpoint-2"].replace("\\_", "_")


def test_the_table_of_teachers(tmp_path: Path) -> None:
    """20 steps: the first and the last two; one teacher comes late, one question twice."""
    log = ScoreLog(tmp_path)
    for step in range(1, 21):
        row = {"step": step, "epoch": 0.0, "question_id": f"q{step % 15}", "tokens": 3}
        rows = [row | {"teacher": "b", "weight": 1.0 if step < 10 else 0.25 + step % 2 / 2}]
        log.append([*rows, *([row | {"teacher": "a", "weight": 0.125}] if step > 19 else [])])
    log.close()
    lines = card_of(tmp_path).splitlines()
    first = lines.index("## Teachers") + 2
    assert lines[first] == "Mean weights over the first and last 2 of 20 steps:"
    assert lines[first + 4 : first + 6] == ["| b | 15 | 1.000 | 0.500 |", "| a | 1 |  | 0.125 |"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert card_of(tmp_path).startswith("---\n")
    (tmp_path / "run.json").write_text('{"student": "org/name", "command": "x"}')
    assert 'base_model: "org/name"' in card_of(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json: expected a JSON object"):
        card_of(tmp_path)


def test_an_exported_student_has_the_facts_of_its_run(tmp_path: Path) -> None:
    """The owner of its base on the hub too; without a run, only what was exported."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter_config.json").write_text("{}")
    (run / "model.safetensors").write_bytes(b"x")
    found = {"student": "org/name", "data": "mine.jsonl", "settings": {"preset": "robust"}}
    (run / "run.json").write_text(json.dumps(found))
    told = card_of(run).partition("# run\n\n")[2].splitlines()
    card = exported_card(str(run), None, "out")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "org/name" and head["library_name"] == "transformers"
    assert told[0].startswith("A student distilled") and set(told) <= set(card.splitlines())
    assert "# out" in card and "Its adapter is merged" in card and "licences" in card
    assert "anew" not in card  # `compact evaluate` has no run to draw it from
    (run / "checkpoint-2").mkdir()
    assert "mine.jsonl" in exported_card("org/name", str(run / "checkpoint-2"), "out")
    bare = exported_card("org/other", None, "out")
    assert 'base_model: "org/other"' in bare and "It has no adapter" in bare
    assert "distilled" not in bare
