"""A base model with a chat template: training teaches the end of turn, and saves it as a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model
from compact.trainer import CompactTrainer
from compact.trainer.merging import export_student
from helpers.templates import byte_tokenizer


def test_the_end_of_turn_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model = build_model(tokenizer, seed=0, hidden=32, layers=1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    args = CompactConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", preset="uniform"
    )
    rows = zoo.make_rows(("good", "verbose"), 2, seed=1)
    trainer = CompactTrainer(model, args, rows, processing_class=tokenizer)
    assert "learn to stop" not in caplog.text  # `all_special_ids` lacks the end of turn
    trainer.save_model(str(tmp_path / "saved"))
    export_student(str(tmp_path / "base"), tmp_path / "out")
    for folder in ("saved", "out"):
        found = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert sorted(found["eos_token_id"]) == ends
