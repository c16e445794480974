"""Saving and resuming: run.json, COMPACT's own state in a checkpoint, errors of a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerState

from compact.config import CompactConfig
from compact.files import ANY_NUMBER, as_json, read_json, replace_whole
from compact.strategies import Strategy
from compact.trainer.checkpoints import damage, newest_whole
from compact.weighting import Weigher

logger = logging.getLogger(__name__)

STATE_FILE = "compact_state.json"
_STATE = {
    "preset?": str,
    "weigher": dict,
    "gains": {str: [ANY_NUMBER]},
    "strategy?": {"name": str, "state": dict},
}
TENSOR_FILE = "strategy.safetensors"
# Hides tokens that were given on the command line, as options or within a mapping.
_TOKEN = re.compile(r"(--\w*token[ =][\"']*|token[\"']*:[\"' ]*)[^\s\"',}]+")
_PACKAGES = ("compact-distill", "torch", "transformers", "accelerate", "peft")


def write_run_file(run: Path, about: dict[str, Any]) -> None:
    """Writes run.json: `about`, the versions of the packages and the command line."""
    more = {
        "versions": {name: version(name) for name in _PACKAGES},
        "command": command_line(),
    }
    check_run_file(run)
    replace_whole(run / "run.json", as_json(about | more))


def command_line() -> str:
    """Returns the command of this process as it can be typed again, without tokens."""
    name, *arguments = sys.argv
    program = Path(name)  # a path of this machine; that of the package with `python -m compact`
    ours = program.name == "compact" or program.parts[-2:] == ("compact", "__main__.py")
    return _TOKEN.sub(r"\1<hidden>", shlex.join(["compact" if ours else name, *arguments]))


def check_run_file(run: Path) -> None:
    """Raises ValueError if a folder's run.json was not written by a run."""
    if (run / "run.json").exists():
        read_json(run / "run.json", {"student": str, "status": str})


def write_state(
    checkpoint: Path,
    args: CompactConfig,
    weigher: Weigher,
    kept_levels: dict[str, list[float]],
    strategy: Strategy,
) -> None:
    """Writes COMPACT's own state into a checkpoint."""
    state: dict[str, Any] = {
        "preset": args.preset,
        "weigher": weigher.state_dict(),
        "gains": kept_levels,  # the name that earlier checkpoints have
    }
    if args.strategy is not None:
        own = strategy.state_dict()
        tensors = {name: v.detach().cpu() for name, v in own.items() if isinstance(v, Tensor)}
        if tensors:
            save_file(
                {n: t.contiguous().clone() for n, t in tensors.items()}, checkpoint / TENSOR_FILE
            )
        plain = {name: value for name, value in own.items() if name not in tensors}
        state["strategy"] = {"name": args.strategy, "state": plain}
    (checkpoint / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")


def read_state(checkpoint: Path, preset: str, strategy: str | None) -> tuple[dict[str, Any], int]:
    """Reads COMPACT's own state from a checkpoint.

    Returns:
        The state (keys weigher, gains, strategy), and the checkpoint's step.

    Raises:
        ValueError: the checkpoint was written with another preset or strategy.
    """
    state = read_json(checkpoint / STATE_FILE, _STATE)
    if state.get("preset", preset) != preset:
        raise ValueError(
            f"preset must be {state['preset']!r} to resume from {checkpoint}, which holds the "
            f"running statistics of that preset, got {preset!r}"
        )
    saved = state.get("strategy", {}).get("name")
    if saved != strategy:
        raise ValueError(
            f"strategy must be {saved!r} to resume from {checkpoint}, which was written with it, "
            f"got {strategy!r}"
        )
    if (checkpoint / TENSOR_FILE).exists():
        state["strategy"]["state"] |= load_file(checkpoint / TENSOR_FILE)
    trainer_state = read_json(checkpoint / "trainer_state.json", {"global_step": int})
    return state, int(trainer_state["global_step"])


def checkpoint_to_resume(run: Path, wanted: str | Path | Literal[True]) -> Path:
    """Returns the checkpoint to resume from, after checking that it is not damaged.

    Args:
        run: the folder of the run.
        wanted: a checkpoint, or True for the newest undamaged one of the run.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it holds no optimizer.
    """
    if wanted is not True:
        problem = damage(Path(wanted))
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint {wanted} cannot be used: {problem}")
        return _with_optimizer(Path(wanted))
    checkpoint, damaged = newest_whole(run)
    if checkpoint is None:
        raise ValueError("; ".join([f"output_dir {run} holds no undamaged checkpoint", *damaged]))
    for line in damaged:
        logger.warning("%s; resuming from %s", line, checkpoint.name)
    return _with_optimizer(checkpoint)


def _with_optimizer(checkpoint: Path) -> Path:
    """Checks for an optimizer: without one, transformers would silently start a new one."""
    if any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*")):
        return checkpoint
    raise ValueError(
        f"resume_from_checkpoint {checkpoint} cannot be used: it was saved with save_only_model, "
        "without optimizer and schedule; to start a new run from its weights, give it as model"
    )


@contextmanager
def cleared_up(staged: Path, final: Path) -> Iterator[None]:
    """On a write error, removes the unfinished folder and raises an OSError that names `final`.

    torch and safetensors report a full disk with errors of other types.
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
    """Writes the state of the callbacks that have one into the trainer's state."""
    states: dict[str, list[Any]] = defaultdict(list)
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states[type(callback).__name__].append(callback.state())
    kept: Any = state.stateful_callbacks  # a dict, but annotated as a list
    for name, several in states.items():
        kept[name] = several if len(several) > 1 else several[0]


def without_tied(model: Any, state_dict: Any) -> Any:
    """Returns gathered weights without the other names of tied ones; None stays None."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return state_dict and {name: w for name, w in state_dict.items() if name not in tied}
