"""Writes a trained student as a folder that other tools read: merged, with a model card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from compact.files import write_whole
from compact.student import base_name, holds_adapter, load_student
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
    staged = out.with_name(f".{out.name}.writing")
    shutil.rmtree(staged, ignore_errors=True)
    with cleared_up(staged, out):
        staged.mkdir(parents=True)
        model.to(dtype).save_pretrained(staged)
        processing_class.save_pretrained(staged)
        write_whole(staged / "README.md", model_card(name, adapter, out.name))
        if out.exists():
            out.rmdir()
        os.replace(staged, out)


def model_card(name: str, adapter: str | None, title: str) -> str:
    """Returns the card of an exported student: its base, how it was trained, what to check."""
    base = name if adapter is not None else base_name(name)
    run: dict[str, Any] = {}
    for folder in (Path(adapter or name), Path(adapter or name).parent):
        if (folder / "run.json").exists():
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            break
    settings = run.get("settings", {})
    facts = {
        "base model": Path(run.get("student", base)).name,
        "adapter": "merged into the weights"
        if adapter is not None or holds_adapter(name)
        else "none",
        "training data": run.get("data"),
        "preset": settings.get("preset"),
        "strategy": settings.get("strategy"),
        "learning rate": settings.get("learning_rate"),
        "versions": run.get("versions"),
    }
    lines = [f"- {fact}: {value}" for fact, value in facts.items() if value is not None]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {title}",
            "",
            "A student trained by COMPACT (arXiv 2601.13992) on rationales of several teachers.",
            "",
            *lines,
            "",
            "Before you share it, check the licences of the base model, of the questions, and of",
            "the teachers whose rationales it learned from (the data card of `compact collect`).",
            "",
        ]
    )
