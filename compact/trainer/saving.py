"""Saving and resuming: run.json, the state beside a checkpoint, what a full disk looks like."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState, TrainerState

from compact.files import write_json
from compact.trainer.checkpoints import damage, newest_whole

logger = logging.getLogger(__name__)

STATE_FILE = "compact_state.json"
_TOKEN = re.compile(r"(--\w*token[ =])\S+")  # a secret on the command line
_PACKAGES = ("compact-distill", "torch", "transformers", "accelerate", "peft")


def write_run_file(run: Path, about: dict[str, Any]) -> None:
    """Writes run.json: what was trained how, with versions and the command line."""
    more = {
        "versions": {name: version(name) for name in _PACKAGES},
        "command": _TOKEN.sub(r"\1<hidden>", " ".join(sys.argv)),
    }
    write_json(run / "run.json", about | more)


def read_state(checkpoint: Path, preset: str) -> tuple[dict[str, Any], int]:
    """Reads what COMPACT keeps in a checkpoint.

    Returns:
        The state (keys weigher, gains, strategy), and the checkpoint's step.

    Raises:
        ValueError: the checkpoint is of another preset than `preset`.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text())
    if state.get("preset", preset) != preset:
        raise ValueError(
            f"preset must be {state['preset']!r} to go on from {checkpoint}, whose running "
            f"statistics are its own, got {preset!r}"
        )
    return state, int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def checkpoint_to_resume(run: Path, wanted: str | Path | Literal[True]) -> Path:
    """Returns the checkpoint to go on from, checked to be whole.

    Args:
        run: the run's folder.
        wanted: a checkpoint, or True for the newest of the run that is whole.

    Raises:
        ValueError: there is none, it is damaged, or it holds no optimizer.
    """
    if wanted is not True:
        problem = damage(Path(wanted))
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint {wanted} cannot be used: {problem}")
        return _with_optimizer(Path(wanted))
    checkpoint, damaged = newest_whole(run)
    if checkpoint is None:
        raise ValueError("; ".join([f"output_dir {run} holds no whole checkpoint", *damaged]))
    for line in damaged:
        logger.warning("%s; going on from %s", line, checkpoint.name)
    return _with_optimizer(checkpoint)


def _with_optimizer(checkpoint: Path) -> Path:
    """The checkpoint; transformers would go on without optimizer and schedule, and not say so."""
    if any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*")):
        return checkpoint
    raise ValueError(
        f"resume_from_checkpoint {checkpoint} cannot be used: it was saved with save_only_model, "
        "without optimizer and schedule; give it as model to start anew from its weights"
    )


@contextmanager
def cleared_up(staged: Path, final: Path) -> Iterator[None]:
    """Removes a half-written folder, and raises an OSError for a full disk.

    torch and safetensors report a full disk each in an error of their own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        free = shutil.disk_usage(next(p for p in staged.parents if p.exists())).free
        code = error.errno if isinstance(error, OSError) else None
        full = code == errno.ENOSPC or "No space left" in str(error) or free < 1 << 20
        if not full and not isinstance(error, OSError) and "File too large" not in str(error):
            raise
        reason = os.strerror(errno.ENOSPC) if full else str(error).splitlines()[0]
        raise OSError(
            errno.ENOSPC if full else code,
            f"{final} could not be written ({free >> 20} MiB free): {reason}",
        ) from error


def keep_callback_states(state: TrainerState, callbacks: Sequence[Any]) -> None:
    """Enters the state of the callbacks that have one into the trainer's state."""
    states: dict[str, list[Any]] = defaultdict(list)
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states[type(callback).__name__].append(callback.state())
    kept: Any = state.stateful_callbacks  # a dict by name, although it is annotated as a list
    for name, several in states.items():
        kept[name] = several if len(several) > 1 else several[0]
