"""Strategies that write, with a model whose table of learned positions ends before their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from compact.config import CompactConfig
from compact.lab.zoo_student import build_tokenizer
from compact.student import generation
from compact.student.generation import generate, generate_in_room, rooms
from compact.trainer import CompactTrainer
from helpers.trajectories import rows_of

TOKENIZER = build_tokenizer()
ROWS = rows_of("good", "wrong-step", problems=2)


def model_of(positions: int) -> Any:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(TOKENIZER)}
    return GPT2LMHeadModel(GPT2Config(n_positions=positions, **sizes)).eval()


def trainer_of(folder: Path, **settings: Any) -> CompactTrainer:
    values = {"preset": "uniform", "max_steps": 1, "max_length": 70, "save_strategy": "no"}
    values |= {"use_cpu": True, "report_to": "none", "output_dir": str(folder / "run")}
    args = CompactConfig(**values | settings)
    return CompactTrainer(model_of(70), args, ROWS, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("co-supervised", {"samples": 1, "probe": 2}),
        ("p-align", {"samples": 1, "judge": "reaches"}),
        ("p-align", {"samples": 1, "judge": "asked"}),
        ("orion", {"samples": 2}),
        ("adaswitch", {"factor": 0}),
    ],
)
def test_texts_end_where_the_positions_end(
    tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    if strategy == "adaswitch":
        model_of(70).save_pretrained(tmp_path / "teacher")
        TOKENIZER.save_pretrained(tmp_path / "teacher")
        options = options | {"teachers": str(tmp_path / "teacher")}
    options = options | {"max_new_tokens": 256}
    trainer_of(tmp_path, strategy=strategy, strategy_options=options).train()


def test_each_text_has_the_room_of_its_own_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """So a text does not depend on the other prompts of its batch."""
    generation._tell_of_positions.cache_clear()
    model = model_of(20)
    prompts = [[1, 2, 3], [4] * 16, [5] * 20, [6] * 25, [7] * 4]
    assert rooms(model, prompts, 9) == [9, 4, 0, 0, 9]
    assert generate_in_room(model, TOKENIZER, prompts[2:4], 9) == [[], []]
    together = generate_in_room(model, TOKENIZER, prompts, 9, temperature=1.0, seeds=range(5))
    for i, (prompt, ids) in enumerate(zip(prompts[:2], together, strict=False)):
        most = min(9, 20 - len(prompt))
        assert generate(model, TOKENIZER, [prompt], most, temperature=1.0, seeds=[i]) == [ids]
    assert rooms(model, prompts[:1], 17) == [17]
    told = [r.getMessage() for r in caplog.records if r.name == generation.__name__]
    assert len(told) == 1 and "max_new_tokens = 9, as the model has learned 20" in told[0]


def test_a_teacher_with_fewer_positions_is_named(tmp_path: Path) -> None:
    model_of(60).save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    options = {"teachers": str(tmp_path / "teacher"), "max_new_tokens": 100, "temperature": 0.0}
    trainer = trainer_of(tmp_path, strategy="adaswitch", strategy_options=options)
    with pytest.raises(ValueError, match="but the white-box teacher has learned 60 positions"):
        trainer.train()
