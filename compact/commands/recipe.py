"""Reads a recipe: flat YAML with field names as keys, and `--key value` options."""

from __future__ import annotations

import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from compact.config import CompactConfig, RecipeConfig
from compact.files import parse_yaml, read_text

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
    types_ = {RecipeConfig: _types(RecipeConfig), CompactConfig: _types(CompactConfig)}
    values: dict[type, dict[str, Any]] = {RecipeConfig: {}, CompactConfig: {}}
    for key, (value, where) in given.items():
        owner = next((cls for cls, known in types_.items() if key in known), None)
        if owner is None:
            raise ValueError(f"{where}: unknown key {key!r}{_suggestion(key)}")
        values[owner][key] = _converted(value, types_[owner][key], f"{where}: {key}")
    recipe_config = RecipeConfig(**values[RecipeConfig])
    config = CompactConfig(**values[CompactConfig])
    given_kwargs = config.model_init_kwargs
    assert not isinstance(given_kwargs, str)  # CompactConfig refuses text that is no mapping
    config.model_init_kwargs = {"dtype": recipe_config.dtype, **(given_kwargs or {})}
    return recipe_config, config


def known_keys() -> list[str]:
    """Returns every key of a recipe."""
    return [*_types(RecipeConfig), *_types(CompactConfig)]


def _read_yaml(path: Path) -> dict[str, tuple[Any, str]]:
    """Key -> (value, file:line)."""
    text = read_text(path)
    values = parse_yaml(text, str(path))
    root = yaml.compose(text)
    if root is None:
        return {}
    if not isinstance(values, dict) or not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    found: dict[str, tuple[Any, str]] = {}
    for node, _ in root.value:
        where = f"{path}:{node.start_mark.line + 1}"
        if node.value in found:
            raise ValueError(f"{where}: key {node.value!r} is given twice")
        found[node.value] = (values.get(node.value), where)
    return found


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


def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, known_keys(), 1)
    near = _OTHER_NAMES.get(key) or (close[0] if close else None)
    return f"; did you mean {near!r}?" if near else ""


def _converted(value: Any, hint: Any, where: str) -> Any:
    """The value as the type of its field, or a ValueError that says what was expected."""
    choices = typing.get_args(hint) if _is_union(hint) else (hint,)
    if any(_is_enum(choice) for choice in choices):
        choices = tuple(choice for choice in choices if choice is not str)  # the members' names
    mapping = any(_is_mapping(choice) for choice in choices)
    if mapping and isinstance(value, str) and value.startswith("{"):  # quoted, in a recipe
        choices = tuple(choice for choice in choices if choice is not str)  # not a path
        with suppress(ValueError):
            value = parse_yaml(value, where)
    for choice in choices:
        result, fits = _fit(value, choice)
        if fits:
            return result
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    raise ValueError(f"{where} must be {_words(choices)}, got {type(value).__name__} {shown}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_mapping(hint: Any) -> bool:
    return hint is dict or typing.get_origin(hint) is dict


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    """(the value as `hint`, whether it fits)."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value, True
    if hint is type(None):
        return None, value is None
    if origin is typing.Literal:
        return value, value in typing.get_args(hint)
    if hint is bool:
        return value, isinstance(value, bool)
    if hint is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return value, False
        try:  # YAML reads 1e-5, without a point, as text
            return float(value), math.isfinite(float(value))
        except ValueError:
            return value, False
    if hint is str:
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
        return str(value), fits
    if hint is list or origin is list:
        items = [v.strip() for v in value.split(",")] if isinstance(value, str) else value
        (item,) = typing.get_args(hint) or (Any,)
        if not isinstance(items, list):
            return value, False
        fitted = [_fit(i, item) for i in items]
        return [i for i, _ in fitted], all(fits for _, fits in fitted)
    if _is_mapping(hint):
        return value, isinstance(value, Mapping)
    if _is_enum(hint):
        value = "no" if value is False else value  # YAML reads no as false
        return value, any(value == member.value for member in hint)
    return value, False


def _words(choices: Sequence[Any]) -> str:
    """How an error names the types of a field."""
    plain = {
        bool: "true or false",
        float: "a number",
        int: "a whole number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    names = []
    for choice in choices:
        if typing.get_origin(choice) is typing.Literal:
            names += [str(value) for value in typing.get_args(choice)]
        elif _is_enum(choice):
            names += [str(member.value) for member in choice]
        elif choice is type(None):
            names.append("null")
        else:
            origin = typing.get_origin(choice) or choice
            names.append(
                plain.get(choice, {list: "a list", dict: "a mapping"}.get(origin, str(choice)))
            )
    return ("one of " if len(names) > 3 else "") + ", ".join(dict.fromkeys(names))
