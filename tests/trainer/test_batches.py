"""Micro-batches whose tensors are built ahead, in worker processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.types import _tensors
from compact.trainer import CompactTrainer
from compact.trainer.runlog import read_scores


def start(folder: Path, **settings: Any) -> CompactTrainer:
    args = CompactConfig(
        output_dir=str(folder),
        use_cpu=True,
        gradient_accumulation_steps=2,
        save_steps=1,
        report_to="none",
        **({"max_steps": 3} | settings),
    )
    model = build_model(tokenizer := build_tokenizer(), 0, hidden=32, layers=1)
    rows = zoo.make_rows(("good", "verbose"), 8, seed=0)
    return CompactTrainer(model, args, rows, processing_class=tokenizer)


def weights(run: CompactTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_workers_build_the_same_steps(tmp_path: Path) -> None:
    """The same bits without workers, with them, and resumed with them."""
    alone, helped = start(tmp_path / "0"), start(tmp_path / "2", dataloader_num_workers=2)
    (micro, *_) = helped.get_train_dataloader()
    assert micro.batch is not None and micro.batch.leaves is not None
    # One storage, so one file descriptor, however many micro-batches a step has.
    assert len({t.untyped_storage().data_ptr() for t in _tensors(micro.batch)}) == 1
    alone.train()
    helped.train()
    assert torch.equal(weights(alone), weights(helped))
    assert read_scores(tmp_path / "0").equals(read_scores(tmp_path / "2"))
    again = start(tmp_path / "2", dataloader_num_workers=2)
    again.train(resume_from_checkpoint=tmp_path / "2/checkpoint-1")
    assert torch.equal(weights(again), weights(alone))


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [({"leaf_every": 2}, False), ({"leaf_every": 2, "preset": "uniform"}, True)],
    ids=str,
)
def test_what_depends_on_the_step_is_built_in_it(
    tmp_path: Path, settings: dict[str, Any], ahead: bool
) -> None:
    """With kept levels the leaves of a micro-batch depend on the steps before."""
    (micro, *_) = start(tmp_path, **settings).get_train_dataloader()
    assert (micro.batch is not None) == ahead
