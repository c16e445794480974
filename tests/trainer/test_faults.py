"""What goes wrong in a run is named, and nothing whole is lost."""

from pathlib import Path

import pytest
import torch

from compact import zoo
from compact.config import CompactConfig
from compact.trainer import CompactTrainer, NonFiniteError
from compact.zoo_student import build_model, build_tokenizer

TOKENIZER = build_tokenizer()


def trainer(folder: Path, **settings: object) -> CompactTrainer:
    settings = {"preset": "uniform", "max_steps": 3, "save_steps": 1} | settings
    args = CompactConfig(
        output_dir=str(folder), use_cpu=True, gradient_accumulation_steps=2, **settings
    )
    rows = zoo.make_rows(("good", "verbose"), 8, seed=0)
    model = build_model(TOKENIZER, 0, hidden=32, layers=1)
    return CompactTrainer(model, args, rows, processing_class=TOKENIZER)


def test_damaged_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_steps=2).train()
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert "checkpoint-2 is damaged: model.safetensors" in caplog.text
    assert "going on from checkpoint-1" in caplog.text


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_loss_that_is_not_finite_names_its_problem(
    tmp_path: Path, action: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, on_nonfinite=action, max_steps=1)
    bad = run.train_dataset.problems[0].question_id
    forward, before = run._forward, torch.cat([p.flatten() for p in run.model.parameters()]).clone()

    def poisoned(work):  # noqa: ANN001, ANN202
        loss, records = forward(work)
        if records[0].question_id == bad:
            raise NonFiniteError(f"question_id {bad!r}: poisoned")
        return loss, records

    run._forward = poisoned
    run.args.train_sampling_strategy = "sequential"
    if action == "stop":
        with pytest.raises(NonFiniteError, match=bad):
            run.train()
        return
    run.train()
    after = torch.cat([p.flatten() for p in run.model.parameters()])
    assert f"skipped question_id {bad!r}" in caplog.text
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)
