"""White-box strategies in an evaluation whose teachers are not all among those of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compact.config import CompactConfig
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer import CompactTrainer
from helpers.toy import save_student
from helpers.trajectories import rows_of

Rows = list[dict[str, str]]
KNOWN = rows_of("good")
UNKNOWN = [row | {"teacher": "z"} for row in rows_of("verbose")]
STRATEGIES = {"adaswitch": {}, "feature-contrast": {"factor": 0.0}}


def trainer_of(
    folder: Path, strategy: str, rows: Rows | None, evals: Rows, **settings: Any
) -> CompactTrainer:
    """Its strategy has a model of the teacher good-0 alone."""
    if not (folder / "teacher").exists():
        save_student(folder / "teacher")
    options = STRATEGIES[strategy] | {"dtype": "float32"}
    options["teachers"] = {"good-0": str(folder / "teacher")}
    values = {"output_dir": str(folder / "run"), "max_length": 400, "use_cpu": True, "seed": 3}
    values |= {"report_to": "none", "disable_tqdm": True, "preset": "uniform", "max_steps": 1}
    values |= {"per_device_train_batch_size": 2, "strategy": strategy, "strategy_options": options}
    tokenizer = build_tokenizer()
    model, args = build_model(tokenizer, seed=0, layers=1), CompactConfig(**values | settings)
    return CompactTrainer(model, args, rows, evals, tokenizer)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "leaves out the rationales" in r.msg]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_loss_is_that_of_the_teachers_with_a_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, strategy: str, size: int
) -> None:
    """Whatever shares a micro-batch: two questions with both teachers, two with one of them."""
    first, second, third = ({row["question_id"]} for row in KNOWN[:3])
    rows = [row for row in KNOWN if row["question_id"] not in third]
    rows += [row for row in UNKNOWN if row["question_id"] not in first]
    assert second
    trainer = trainer_of(tmp_path, strategy, KNOWN, rows, per_device_eval_batch_size=size)
    mixed = trainer.evaluate()
    assert told(caplog) == [
        f"evaluation: the loss leaves out the rationales of z, because strategy {strategy} has no "
        "model of these teachers"
    ]
    alone = trainer.evaluate([row for row in rows if row["teacher"] != "z"])
    assert mixed["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert mixed["eval_loss"] > 0.01 and mixed["eval_nll"] != pytest.approx(alone["eval_nll"])
    assert len(told(caplog)) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 8])
def test_without_such_a_teacher_there_is_no_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, strategy: str, size: int
) -> None:
    """Not 0, which would be the best of all, and not an error."""
    trainer = trainer_of(tmp_path, strategy, KNOWN, UNKNOWN, per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics and metrics["eval_nll"] > 0
    assert len(told(caplog)) == 1
    assert "no problem can have a loss; there is no eval_loss" in caplog.text
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    words = f"one of nll, got 'loss': no problem .* strategy {strategy}$"
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, strategy, KNOWN, UNKNOWN, **best)


def test_an_evaluation_without_training_has_no_models(tmp_path: Path) -> None:
    metrics = trainer_of(tmp_path, "adaswitch", None, KNOWN).evaluate()
    assert "eval_loss" not in metrics and metrics["eval_nll"] > 0
