"""How often a training step makes the host wait for a GPU, counted on a simulated device."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from compact.config import CompactConfig
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import attention as trees
from compact.trainer import CompactTrainer
from compact_ops import flash_tree
from helpers.device import DEVICE, move, simulated

MOST_A_MICRO_BATCH, MOST_A_STEP = 2, 1


class Marks(TrainerCallback):
    """Notes how many waits there were at the start of a step and after each micro-batch."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.at: list[int] = []

    def note(self, *_: Any, **__: Any) -> None:
        self.at.append(len(self.waits))

    on_step_begin = on_substep_end = on_step_end = note


def started(folder: Path, **settings: Any) -> CompactTrainer:
    """A trainer of two steps of two micro-batches."""
    settings = {"max_steps": 2, "max_length": 600, "per_device_train_batch_size": 2} | settings
    args = CompactConfig(
        output_dir=str(folder),
        gradient_accumulation_steps=2,
        save_strategy="no",
        logging_steps=100,  # a line of the log reads loss and norm of the step
        report_to="none",
        **settings,
    )
    rows = zoo.make_rows(("good", "verbose"), 8, seed=0)
    model = build_model(tokenizer := build_tokenizer(), 0, hidden=32, layers=1)
    return CompactTrainer(model, args, rows, processing_class=tokenizer)


def waits_of(folder: Path, **settings: Any) -> list[list[str]]:
    """Trains two steps of two micro-batches; returns the waits of each half of the second step.

    The second half has those of the last micro-batch and of the end of the step.
    """
    run, marks = started(folder, use_cpu=True, **settings), Marks()
    run.add_callback(marks)
    with simulated() as seen:
        marks.waits = seen.places
        move(run.model)
        run.args.__dict__["_setup_devices"] = run.accelerator.state.device = DEVICE
        run.train()
    first, middle, end = marks.at[3:]
    return [seen.places[first:middle], seen.places[middle:end]]


@pytest.mark.cuda
def test_a_step_on_a_gpu_does_not_wait(tmp_path: Path) -> None:
    """What PyTorch itself says of a real GPU: no blocking call in the second step.

    The one wait of a step is for an event, which it does not count.
    """
    run = started(tmp_path, bf16=True)

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn")

    run.add_callback(Watch())
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [str(w.message) for w in found if "synchroniz" in str(w.message)]
    assert len(told) <= MOST_A_STEP + 2, told  # the end of the run reads the summed loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"on_nonfinite": "skip"},
        {"leaf_every": 2},
        {"token_weights": "eaft"},
        {"preset": "uniform"},
        {"preset": "answer-vote"},
        {"preset": "paper"},
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_at_most_twice_a_micro_batch_and_once(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    half, rest = waits_of(tmp_path, **settings)
    assert len(half) <= MOST_A_MICRO_BATCH, half
    assert len(rest) <= MOST_A_MICRO_BATCH + MOST_A_STEP, rest


def test_the_default_waits_once_a_step(tmp_path: Path) -> None:
    """The default preset with answer leaves: only the results of the step are waited for."""
    half, rest = waits_of(tmp_path)
    assert not half
    assert [wait.split(" ")[0] for wait in rest] == ["results"]


def test_flash_attention_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of half precision on a GPU, with calls of flash attention that compute nothing."""
    calls = []

    def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])

    def backward(_: Tensor, *qkv: Any) -> list[Tensor]:
        return [torch.zeros_like(t) for t in qkv[:3]]

    for module in (trees, importlib.import_module("compact_ops.tree_attention")):
        monkeypatch.setattr(module, "flash_supports", lambda *_: True)
    monkeypatch.setattr(flash_tree, "_flash_forward", forward)
    monkeypatch.setattr(flash_tree, "_flash_backward", backward)
    half, rest = waits_of(tmp_path)
    assert calls and not half
    assert [wait.split(" ")[0] for wait in rest] == ["results"]


def test_the_simulated_device_sees_what_waits() -> None:
    with simulated() as seen:
        x = torch.arange(4.0, device=DEVICE)
        (x + 1).relu()
        assert not seen.places
        float(x[0])
        x[x > 1]
        torch.tensor([1.0], device=DEVICE)
        x.to("cpu")
        torch.repeat_interleave(x.long())
        assert len(seen.places) == 5
        with pytest.raises(RuntimeError, match="on the same device"):
            x + torch.ones(4)
