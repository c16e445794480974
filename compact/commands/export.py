"""`compact export`: merges a student's adapter into a folder that servers and converters read."""

from __future__ import annotations

import argparse

import torch

from compact.trainer.merging import export_student

EPILOG = """example:
  compact export --model runs/svamp --out svamp-student

vLLM, SGLang, transformers serve and llama.cpp's convert_hf_to_gguf.py read the folder.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact export`."""
    parser.add_argument("--model", required=True, help="run, folder, Hugging Face name or .gguf")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to merge onto the model")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="weights [float32]")


def run(args: argparse.Namespace) -> int:
    """Runs `compact export`; returns the exit status."""
    export_student(args.model, args.out, adapter=args.adapter, dtype=DTYPES[args.dtype])
    print(f"{args.model} -> {args.out}")
    return 0
