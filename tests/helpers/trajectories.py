"""A tiny training run whose losses and parameters tests compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer import CompactTrainer

TEACHERS = ("good", "verbose", "wrong-step")
# Weights far from uniform from the first step on, probes, running statistics, consistency term.
WEIGHED: dict[str, Any] = {
    "preset": "paper",
    "overrides": {"adaptability": "gain", "eps": 0.0, "shrink": 0.5},
}


def rows_of(*teachers: str, problems: int = 4) -> list[dict[str, str]]:
    """Rows of a zoo; a teacher named twice becomes two with the same text."""
    rows = zoo.make_rows(sorted(set(teachers)), problems, seed=11)
    by = {(r["question_id"], r["teacher"]): r for r in rows}
    questions = sorted({r["question_id"] for r in rows})
    return [by[q, t] | {"teacher": f"{t}-{i}"} for q in questions for i, t in enumerate(teachers)]


def trainer_of(
    folder: Path, rows: list[dict[str, str]], *, size: dict[str, int] | None = None, **settings: Any
) -> CompactTrainer:
    """A trainer of a tiny student, for two steps of four problems unless the settings say else."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "preset": "uniform",
        "max_length": 400,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # no step of full size where a gradient is only rounding
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    tokenizer = build_tokenizer()
    return CompactTrainer(
        build_model(tokenizer, seed=0, layers=2, **size or {}),
        CompactConfig(**values | settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def train(
    folder: Path, rows: list[dict[str, str]], **settings: Any
) -> tuple[list[float], torch.Tensor]:
    """Trains a tiny student for two steps of four problems; its losses and its parameters."""
    trainer = trainer_of(folder, rows, **settings)
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=checkpoint) if checkpoint else trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
