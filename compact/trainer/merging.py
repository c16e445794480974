"""Writes a trained student as a folder that other tools read: merged, with a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from compact.files import write_whole
from compact.student import load_student
from compact.student.generation import keep_stop_ids
from compact.trainer.card import exported_card
from compact.trainer.saving import cleared_up


def export_student(
    name: str, out: str | Path, *, adapter: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Merges a student's adapter into its base and saves weights, tokenizer and model card.

    vLLM, SGLang and llama.cpp's converter read the folder. A .gguf student is saved dequantised.

    Args:
        name: a run's folder, a model folder, a hub name or a .gguf file.
        out: the folder to write; it must be new or empty.
        adapter: folder of an adapter to merge onto the model.
        dtype: of the saved weights. The merge itself is computed in float32.

    Raises:
        ValueError: `out` has files, or the model cannot be read.
        OSError: there is no such model, or the folder cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out must be a new or empty folder, got {out}")
    model, processing_class = load_student(name, adapter=adapter, dtype=torch.float32)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    keep_stop_ids(model, processing_class)
    staged = out.with_name(f".{out.name}.writing")
    shutil.rmtree(staged, ignore_errors=True)
    with cleared_up(staged, out):
        staged.mkdir(parents=True)
        model.to(dtype).save_pretrained(staged)
        processing_class.save_pretrained(staged)
        write_whole(staged / "README.md", exported_card(name, adapter, out.name))
        if out.exists():
            out.rmdir()
        os.replace(staged, out)
