"""Prints lines of progress: step, loss, mean weight of each teacher, time left."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from compact.means import Means

_SECONDS_BETWEEN_LINES = 5.0


class ProgressLines(TrainerCallback):
    """Prints a line every few seconds, with means over the steps since the last line."""

    def __init__(self) -> None:
        self._means = Means()
        self._begin = self._last = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self._begin = self._last = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Adds the logged values to the means, and prints a line if enough time has passed."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            parts = [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in logs.items() if _measures(k)]
            print(f"step {state.global_step}  held-out: {'  '.join(parts)}", flush=True)
        if "loss" not in logs:
            return
        for name, value in logs.items():
            self._means.add(name, float(value))
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and state.global_step < state.max_steps:
            return
        means = self._means.take()
        weights = [
            f"{name.removeprefix('weight/')} {value:.2f}"
            for name, value in means.items()
            if name.startswith("weight/")
        ]
        done = state.global_step - self._first_step
        left = (now - self._begin) / max(done, 1) * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step}/{state.max_steps}  loss {means['loss']:.4f}  "
            f"weights: {', '.join(weights)}  {int(left) // 60}:{int(left) % 60:02d} left",
            flush=True,
        )
        self._last = now


def _measures(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("runtime", "per_second"))


def show_progress(trainer: Trainer) -> None:
    """Replaces the progress bar and the printed dictionaries of transformers by these lines."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressLines())
