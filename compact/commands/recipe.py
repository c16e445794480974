"""Reads a recipe: flat YAML with field names as keys, and `--key value` options."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compact.config import CompactConfig, RecipeConfig
from compact.fields import compose, converted, field_types, mapping
from compact.files import parse_yaml

# Another name of a key, as in other tools -> its name here.
_OTHER_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "policy": "preset",
    "packing": "layout",
    "probe_every": "leaf_every",
    "torch_dtype": "dtype",
    "lora": "use_peft",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}


def read_settings(
    recipe: str | Path | None, options: Sequence[str]
) -> tuple[RecipeConfig, CompactConfig]:
    """Reads a recipe and the options that override it.

    Args:
        recipe: a YAML file, or None.
        options: `--key value`, `--key=value`, or `--key` alone for true; a list as `a,b`.

    Returns:
        The model, data and LoRA keys, and the trainer's settings.

    Raises:
        ValueError: a key is unknown (the message suggests the nearest known key), or a value has
            the wrong type or is not allowed. The message starts with `file:line` or `--key`.
        OSError: the file cannot be read.
    """
    given: dict[str, tuple[Any, str]] = {}
    if recipe is not None:
        given |= _read_yaml(Path(recipe))
    given |= _read_options(options)
    types_ = {RecipeConfig: field_types(RecipeConfig), CompactConfig: field_types(CompactConfig)}
    values: dict[type, dict[str, Any]] = {RecipeConfig: {}, CompactConfig: {}}
    for key, (value, where) in given.items():
        owner = next((cls for cls, known in types_.items() if key in known), None)
        if owner is None:
            raise ValueError(f"{where}: unknown key {key!r}{_suggestion(key)}")
        values[owner][key] = converted(value, types_[owner][key], f"{where}: {key}")
    recipe_config = RecipeConfig(**values[RecipeConfig])
    config = CompactConfig(**values[CompactConfig])
    given_kwargs = config.model_init_kwargs
    assert not isinstance(given_kwargs, str)  # CompactConfig refuses text that is no mapping
    config.model_init_kwargs = {"dtype": recipe_config.dtype, **(given_kwargs or {})}
    return recipe_config, config


def known_keys() -> list[str]:
    """Returns every key of a recipe."""
    return [*field_types(RecipeConfig), *field_types(CompactConfig)]


def _read_yaml(path: Path) -> dict[str, tuple[Any, str]]:
    """Key -> (value, file:line)."""
    root, values = compose(path)
    if root is None:
        return {}
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return mapping(root, values, path)


def _read_options(options: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Key -> (value, --key)."""
    found: dict[str, tuple[Any, str]] = {}
    rest = list(options)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or len(option) == 2:
            raise ValueError(f"expected --key value, got {option!r}")
        name, equals, text = option[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if not text.strip():
            raise ValueError(f"--{name} must have a value (null for none), got {text!r}")
        try:
            value = parse_yaml(text, f"--{name}")
        except ValueError:
            value = text
        found[name] = (value, f"--{name}")
    return found


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, known_keys(), 1)
    near = _OTHER_NAMES.get(key) or (close[0] if close else None)
    return f"; did you mean {near!r}?" if near else ""
