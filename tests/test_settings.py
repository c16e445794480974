"""The options that docs/trainer.md shows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from compact.config import CompactConfig
from compact.settings import RecipeConfig, as_markdown

DOCS = Path(__file__).parents[1] / "docs" / "trainer.md"


def test_the_trainer_guide_is_current() -> None:
    text = DOCS.read_text()
    inherited = {field.name for field in fields(TrainingArguments)}
    own = [field for field in fields(CompactConfig) if field.name not in inherited]
    for options in (own, fields(RecipeConfig)):
        assert as_markdown(options) in text
