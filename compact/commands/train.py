"""`compact train`: trains a student from a recipe, in one process or several (accelerate)."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compact.commands.cli import REPORT_TO_LAUNCHER
from compact.commands.recipe import read_before_torch, read_settings
from compact.data import Problem, load_problems, warn_of_overlap
from compact.files import shipped
from compact.options import check_given
from compact.student import named_students
from compact.trainer.checkpoints import check_fresh, check_not_student, newest_whole

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from compact.config import CompactConfig
    from compact.settings import RecipeConfig

EPILOG = """keys of a recipe, also as --key value (overrides the recipe):
  model, data, eval_data, output_dir, preset, overrides, max_length, layout, leaf_every,
  use_peft, lora_r, learning_rate, num_train_epochs, gradient_accumulation_steps, ...:
  every field of CompactConfig, including those of transformers.TrainingArguments.

example:
  compact train --config recipe.yaml --learning_rate 2e-4
  compact train --config recipe.yaml --num_processes 2 --accelerate_config fsdp2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact train`; all other options are keys of the recipe."""
    parser.add_argument("--config", metavar="RECIPE", help="flat YAML, one key per line")
    parser.add_argument("--num_processes", type=int, metavar="N", help="start N processes")
    parser.add_argument(
        "--accelerate_config", metavar="NAME", help="file, or name of one in recipes/accelerate"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact train`; returns the exit status.

    Args:
        args: from `add_arguments`, and `options`: the rest of the command line, keys of the recipe.

    Raises:
        ValueError, TypeError, OSError: a setting, a row of the data or a file cannot be used.
    """
    # What needs no torch is refused before it loads, which takes seconds.
    recipe, output_dir, resumed = read_before_torch(args.config, args.options)
    if recipe.model is None or recipe.data is None:
        name = "model" if recipe.model is None else "data"
        read_settings(args.config, args.options)  # raises if its key is misspelt
        raise ValueError(f"{name} must be given, in the recipe or as --{name}")
    check_not_student(output_dir, *named_students(recipe.model))
    if not resumed:
        check_fresh(output_dir)
    try:
        if args.num_processes is not None or args.accelerate_config is not None:
            read_settings(args.config, args.options)  # so that one process reports an error
            _launch(args)
        else:
            problems = load_problems(recipe.data)[: recipe.max_problems]
            evals = load_problems(recipe.eval_data) if recipe.eval_data else None
            _, config = read_settings(args.config, args.options)
            _train(recipe.model, recipe.data, problems, evals, recipe, config)
    except KeyboardInterrupt:
        checkpoint, _ = newest_whole(output_dir)
        if checkpoint is None:
            raise
        raise KeyboardInterrupt(
            f"{checkpoint} is complete: resume with --resume_from_checkpoint true"
        ) from None
    return 0


def _train(
    model: str,
    data: str,
    problems: Sequence[Problem],
    evals: Sequence[Problem] | None,
    recipe: RecipeConfig,
    config: CompactConfig,
) -> None:
    """Trains `model` on `problems` in this process, alone or as one of several."""
    from transformers.trainer_utils import IntervalStrategy
    from transformers.utils.logging import disable_progress_bar

    from compact.student import peft_config
    from compact.trainer import CompactTrainer, NonFiniteError
    from compact.trainer.progress import show_progress

    disable_progress_bar()  # type: ignore[no-untyped-call]  # for reading and writing files
    if evals and config.eval_strategy == IntervalStrategy.NO:
        config.eval_strategy, config.do_eval = IntervalStrategy.EPOCH, True
    try:
        trainer = CompactTrainer(
            model,
            config,
            train_dataset=problems,
            eval_dataset=evals,
            peft_config=peft_config(recipe),
        )
    except RuntimeError as error:  # transformers: a logger in report_to is not installed
        if "to be installed" in str(error):
            raise ImportError(str(error)) from error
        raise
    trainer.data_name = data
    if evals and trainer.is_world_process_zero():
        warn_of_overlap("eval_data", evals, problems)
    show_progress(trainer)
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except NonFiniteError:  # every rank raises it, so all can leave the group
        trainer.accelerator.end_training()
        raise
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"student, log and scores: {config.output_dir}", flush=True)
    trainer.accelerator.end_training()


def _launch(args: argparse.Namespace) -> None:
    """Starts `compact train` on several processes through accelerate, and waits for them.

    Raises:
        ValueError: the number or configuration cannot be used, or a process failed.
        KeyboardInterrupt: Ctrl-C, once every process has ended.
    """
    file = _accelerate_config(args.accelerate_config or "ddp")
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = ["--config_file", str(file)]
    check_given(args, "num_processes", least=1)
    if args.num_processes is not None:
        command += ["--num_processes", str(args.num_processes)]
        if not torch.cuda.is_available():
            threads = max((os.cpu_count() or 1) // args.num_processes, 1)
            command += ["--num_cpu_threads_per_process", str(threads)]
    command += ["-m", "compact", "train"]
    command += ["--config", args.config] if args.config else []
    logging.disable(logging.ERROR)  # the failure of a process is reported once, below
    os.environ[REPORT_TO_LAUNCHER] = "1"
    try:
        launch_command(launch_command_parser().parse_args([*command, *args.options]))
    except ChildFailedError as error:
        raise ValueError(_cause(error)) from None
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # one process, which has printed its error
    except SignalException as stop:
        raise KeyboardInterrupt from stop
    finally:
        del os.environ[REPORT_TO_LAUNCHER]
        logging.disable(logging.NOTSET)


def _cause(error: ChildFailedError) -> str:
    """Returns the first failure: an error that a process reported, else how a process ended."""

    def place(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int]:
        failure = item[1]
        told = isinstance(failure.message, dict)  # cli.py wrote it to the error file
        ended = failure.exitcode == -signal.SIGTERM  # killed by the launcher after another failed
        return not told, ended, failure.timestamp

    rank, failure = min(error.failures.items(), key=place)
    if isinstance(failure.message, dict):
        return failure.message["message"]
    how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
    return f"process {rank} failed ({how})"


def _accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration; `name` is a path or a name in recipes/accelerate."""
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in shipped("recipes/accelerate").glob("*.yaml")}
    if name not in known:
        raise ValueError(
            f"--accelerate_config must be a file or one of {', '.join(sorted(known))}, got {name!r}"
        )
    return known[name]
