"""Reads YAML files and puts their values into the fields of a dataclass, with errors by line."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from compact.files import parse_yaml, read_text


def compose(path: Path) -> tuple[yaml.Node | None, Any]:
    """Reads a YAML file.

    Returns:
        The root node, whose marks give the lines (None if the file is empty), and the value.

    Raises:
        ValueError: the file is not UTF-8 or not YAML; the message names file and line.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    values = parse_yaml(text, str(path))
    return yaml.compose(text), values


def mapping(node: yaml.MappingNode, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns key -> (value, `file:line`) of a mapping.

    Raises:
        ValueError: a key is given twice.
    """
    found: dict[str, tuple[Any, str]] = {}
    for key, scalar in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if key.value in found:
            raise ValueError(f"{where}: key {key.value!r} is given twice")
        value = values.get(key.value)
        plain = isinstance(scalar, yaml.ScalarNode)
        found[key.value] = (as_written(value, scalar.value) if plain else value, where)
    return found


def as_written(value: Any, text: str) -> Any:
    """Returns the value of a YAML scalar, or its text where the number is written differently.

    010 and 1.10 may be names; as numbers they would become 8 and 1.1.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if isinstance(value, date) or number and str(value) != text else value


def field_types(cls: type) -> dict[str, Any]:
    """Returns the type of each field of a dataclass that its constructor takes."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def converted(value: Any, hint: Any, where: str) -> Any:
    """Returns a value as the type of its field.

    Args:
        value: as YAML gives it.
        hint: the type of the field.
        where: what the error names.

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
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
        if isinstance(value, str):  # `as_written`
            with suppress(ValueError):
                value = parse_yaml(value, "")
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
