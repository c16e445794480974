"""A run that is killed between two checkpoints and resumed must end with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from compact.trainer import CompactTrainer
from helpers.trajectories import TEACHERS, rows_of, train

ROOT = Path(__file__).parents[2]


class _Stop(TrainerCallback):
    """Ends the run in the middle of step `after` + 1."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def assert_resumes(folder: Path, *, steps: int = 6, stop: int = 3, **settings: Any) -> None:
    """Trains once whole and once stopped after `stop` steps, from a checkpoint one step before.

    The resumed run has a new trainer, model and strategy, as after a kill.
    """
    rows = rows_of(*TEACHERS)
    saving = {"max_steps": steps, "save_strategy": "steps", "save_steps": stop - 1}
    saving |= {"per_device_train_batch_size": 2}
    whole = train(folder / "whole", rows, **saving | settings)
    original = CompactTrainer.train

    def stopped(self: CompactTrainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(_Stop(stop))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompactTrainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(folder / "killed", rows, **saving | settings)
    checkpoint = folder / f"killed/checkpoint-{stop - 1}"
    resumed = train(
        folder / "killed", rows, **saving | settings, resume_from_checkpoint=str(checkpoint)
    )
    assert torch.equal(whole[1], resumed[1])


_RUN = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from helpers.trajectories import TEACHERS, rows_of, train
from compact.trainer.checkpoints import newest_whole
folder, out, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
checkpoint, _ = newest_whole(folder)
if checkpoint is not None:
    settings["resume_from_checkpoint"] = str(checkpoint)
losses, parameters = train(folder, rows_of(*TEACHERS), save_strategy="steps", save_steps=1,
                           per_device_train_batch_size=2, **settings)
torch.save(parameters, out)
"""


def _start(folder: Path, out: Path, settings: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", _RUN, str(folder), str(out), settings]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def assert_survives_sigkill(folder: Path, settings: str) -> None:
    """SIGKILLs a run in a process of its own after its second checkpoint, and resumes it.

    Args:
        folder: a folder for the runs.
        settings: of the run, as JSON.
    """
    for name in ("whole", "killed"):
        process = _start(folder / name, folder / f"{name}.pt", settings)
        try:
            if name == "killed":
                deadline = time.monotonic() + 600
                while not (folder / "killed/checkpoint-2").exists():
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.005)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                process = _start(folder / name, folder / f"{name}.pt", settings)
            _, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
        assert process.returncode == 0, stderr.decode()[-2000:]
    assert torch.equal(torch.load(folder / "whole.pt"), torch.load(folder / "killed.pt"))
