"""Names a student: the folder, file or hub name of a model, of its adapter and of its base.

Reads small files only, so that a command can check names before it loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compact.files import read_json

ADAPTER_FILE = "adapter_config.json"


def holds_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (Path(name) / ADAPTER_FILE).exists()


def named_students(model: Any) -> list[str]:
    """Returns the names of a student and of its base model: folders, files or names on the hub.

    Args:
        model: a model, or its name.
    """
    if not isinstance(model, str | Path):
        config = getattr(model, "config", None)
        return [name for name in [getattr(config, "name_or_path", None)] if name]
    return list(dict.fromkeys([str(model), base_name(str(model))]))


def base_name(name: str) -> str:
    """Returns the base model of the adapter in folder `name`; `name` itself without an adapter.

    Raises:
        ValueError: neither the run's run.json nor the adapter's config names the base model.
    """
    if not holds_adapter(name):
        return name
    folder = Path(name)
    for run in (folder, folder.parent):
        if (run / "run.json").exists():
            student: str = read_json(run / "run.json", {"student": str})["student"]
            return student
    config = read_json(folder / ADAPTER_FILE, {"base_model_name_or_path?": (str, None)})
    base: str | None = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}: its adapter names no base model; give --model BASE --adapter")
    return base
