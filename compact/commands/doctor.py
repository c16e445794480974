"""`compact doctor MODEL`: shows how this student is trained on this machine, and its memory."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import get_peft_model

from compact.evaluation.doctor import describe, needs
from compact.options import check_given
from compact.settings import MAX_LENGTH, RecipeConfig
from compact.student import Student, load_model, load_student, peft_config

EPILOG = """example:
  compact doctor HuggingFaceTB/SmolLM2-135M-Instruct --tokens 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact doctor`."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder (also of a run), Hugging Face name or .gguf file"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=MAX_LENGTH,
        metavar="N",
        help=f"most tokens of prompt and rationale [{MAX_LENGTH}]",
    )
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="M", help="tokens of a micro-batch [1024]"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `compact doctor`; returns the exit status."""
    check_given(args, "max_length", "tokens", least=1)
    model, processing_class = _loaded(args.model)  # an adapter is checked, then left out
    model = model.unload() if hasattr(model, "peft_config") else model
    student = Student.of(model, processing_class)
    for line in describe(student, args.max_length):
        print(line)
    model.train()
    print(f"full training {needs(student, args.tokens)}")
    recipe = RecipeConfig()
    try:
        adapted = get_peft_model(model, peft_config(recipe))
    except ValueError as error:  # the model has none of the default target layers
        print(f"LoRA          not possible with the default lora_target_modules: {error}")
        return 0
    print(f"LoRA, r = {recipe.lora_r:<4d}{needs(Student.of(adapted), args.tokens)}")
    return 0


def _loaded(name: str) -> tuple[Any, Any]:
    """Loads a student where it would be trained: on the GPU, if there is one and it fits."""
    try:
        return load_model(name)
    except torch.OutOfMemoryError:
        print("the student in float32 does not fit on the GPU; what follows is of the CPU")
        return load_student(name)
