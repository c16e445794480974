"""Questions and teachers.yaml, written by the tests of collecting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def questions(tmp_path: Path) -> Callable[[int], Path]:
    """Writes questions of two numbers and their sums."""

    def write(count: int) -> Path:
        path = tmp_path / "questions.jsonl"
        rows = [
            {"question_id": f"q{i}", "prompt": f"What is {i} + {i % 7}?", "answer": str(i + i % 7)}
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def teachers(tmp_path: Path) -> Callable[..., Path]:
    """Writes teachers.yaml; each teacher is a mapping of keys."""

    def write(*entries: dict[str, Any]) -> Path:
        path = tmp_path / "teachers.yaml"
        path.write_text(yaml.safe_dump(list(entries), sort_keys=False))
        return path

    return write
