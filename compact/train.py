"""`compact train`: trains a student by a recipe, on one process or several (accelerate)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from compact.data import load_problems
from compact.progress import show_progress
from compact.recipe import read_settings
from compact.trainer import CompactTrainer

EPILOG = """keys of a recipe, also as --key value (these win):
  model, data, eval_data, output_dir, preset, overrides, max_length, packing, probe_every,
  use_peft, lora_r, learning_rate, num_train_epochs, gradient_accumulation_steps, ...:
  every field of CompactConfig, which has those of transformers.TrainingArguments.

example:
  compact train --config recipes/svamp.yaml --learning_rate 2e-4
  compact train --config recipes/svamp.yaml --num_processes 2 --accelerate_config fsdp2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact train`; what it does not know is a key of the recipe."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--config", metavar="RECIPE", help="flat YAML, one key a line")
    parser.add_argument("--num_processes", type=int, metavar="N", help="start N processes")
    parser.add_argument(
        "--accelerate_config", metavar="NAME", help="file, or name of one in recipes/accelerate"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact train`; returns the exit status.

    Args:
        args: from `add_arguments`, and `options`: the rest of the command line, keys of the recipe.

    Raises:
        ValueError, TypeError, OSError: a setting, a row of the data or a file that cannot be used.
    """
    if args.num_processes is not None or args.accelerate_config is not None:
        return _launch(args)
    recipe, config = read_settings(args.config, args.options)
    for name in ("model", "data"):
        if getattr(recipe, name) is None:
            raise ValueError(f"{name} must be given, in the recipe or as --{name}")
    # Before a model is read: a bad row should not cost a minute.
    problems = load_problems(recipe.data)[: recipe.max_problems]
    evals = load_problems(recipe.eval_data) if recipe.eval_data else None
    config.model_init_kwargs = {"dtype": recipe.dtype, **(config.model_init_kwargs or {})}
    trainer = CompactTrainer(
        recipe.model,
        config,
        train_dataset=problems,
        eval_dataset=evals,
        peft_config=recipe.peft_config(),
    )
    trainer.data_name = recipe.data
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"student, log and scores: {config.output_dir}", flush=True)
    return 0


def _launch(args: argparse.Namespace) -> int:
    """Starts `compact train` on several processes through accelerate; returns its exit status."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if args.accelerate_config is not None:
        command += ["--config_file", str(_accelerate_config(args.accelerate_config))]
    if args.num_processes is not None:
        if args.num_processes < 1:
            raise ValueError(f"--num_processes must be at least 1, got {args.num_processes}")
        command += ["--num_processes", str(args.num_processes)]
        if args.num_processes > 1 and args.accelerate_config is None:
            command += ["--multi_gpu"]  # gloo ranks where there is no GPU
    command += ["-m", "compact.cli", "train"]
    command += ["--config", args.config] if args.config else []
    return subprocess.run([*command, *args.options], check=False).returncode


def _accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration: a path, or a name under recipes/accelerate."""
    shipped = Path(__file__).parents[1] / "recipes" / "accelerate"
    for path in (Path(name), Path("recipes/accelerate") / f"{name}.yaml", shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    raise ValueError(
        f"--accelerate_config must be a file or one of {', '.join(known) or '(none)'}, got {name!r}"
    )
