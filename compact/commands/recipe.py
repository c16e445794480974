"""Reads a recipe: flat YAML with field names as keys, and `--key value` options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compact.fields import as_written, compose, converted, field_types, mapping
from compact.files import parse_yaml
from compact.registry import closest
from compact.settings import (
    OUTPUT_DIR,
    ComparisonConfig,
    RecipeConfig,
    check_output_dir,
)
from compact.sft_names import SETTINGS, settings_of

if TYPE_CHECKING:
    from compact.config import CompactConfig

# Another name of a key, as in other tools -> its name here.
_OTHER_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "policy": "preset",
    "probe_every": "leaf_every",
    "torch_dtype": "dtype",
    "lora": "use_peft",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "attn_implementation": "model_init_kwargs",
    "load_in_4bit": "model_init_kwargs",
    "model_revision": "model_init_kwargs",
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
    from compact.config import CompactConfig

    recipe_config, config = _read(recipe, options, RecipeConfig, CompactConfig)
    return recipe_config, config


def read_before_torch(
    recipe: str | Path | None, options: Sequence[str]
) -> tuple[RecipeConfig, Path, bool]:
    """Reads what can be checked at once; `read_settings` takes seconds to load torch.

    Returns:
        The model, data and LoRA keys, the folder of the run, and whether it is resumed. Other keys
        are not checked.

    Raises:
        ValueError, OSError: as `read_settings`, for these keys.
    """
    given = _given(recipe, options)
    types = field_types(RecipeConfig)
    values = {
        key: converted(value, types[key], f"{where}: {key}")
        for key, (value, where) in given.items()
        if key in types
    }
    value, where = given.get("output_dir", (OUTPUT_DIR, ""))
    output_dir = converted(value, str | None, f"{where}: output_dir")
    check_output_dir(output_dir)
    resume, _ = given.get("resume_from_checkpoint", (None, ""))
    return RecipeConfig(**values), Path(output_dir), bool(resume)


def read_comparison(
    recipe: str | Path,
) -> tuple[RecipeConfig, CompactConfig, ComparisonConfig]:
    """Reads a recipe that may also say what to compare; raises as `read_settings`."""
    from compact.config import CompactConfig

    settings = _read(recipe, [], RecipeConfig, CompactConfig, ComparisonConfig)
    recipe_config, config, comparison = settings
    return recipe_config, config, comparison


def known_keys() -> list[str]:
    """Returns every key of a recipe."""
    from compact.config import CompactConfig

    return [*field_types(RecipeConfig), *field_types(CompactConfig)]


def _read(recipe: str | Path | None, options: Sequence[str], *owners: Any) -> list[Any]:
    """Returns one object of each class of `owners`, RecipeConfig and CompactConfig first."""
    given = _given(recipe, options)
    types_ = [field_types(owner) for owner in owners]
    values: list[dict[str, Any]] = [{} for _ in owners]
    # TRL's names last: they must not stand beside what they become.
    for key, (value, where) in sorted(given.items(), key=lambda item: item[0] in SETTINGS):
        for known, mine in zip(types_, values, strict=True):
            if key in known:
                mine[key] = converted(value, known[key], f"{where}: {key}")
                break
        else:
            if key not in SETTINGS:
                raise ValueError(f"{where}: unknown key {key!r}{_suggestion(key)}")
            try:
                found = settings_of({**values[1], key: value}, types_[1])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            for name in found.keys() - values[1].keys():
                values[1][name] = converted(found[name], types_[1][name], f"{where}: {key}")
    made = [owner(**mine) for owner, mine in zip(owners, values, strict=True)]
    config, dtype = made[1], made[0].dtype
    config.model_init_kwargs = {"dtype": dtype, **(config.model_init_kwargs or {})}
    return made


def _given(recipe: str | Path | None, options: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Key -> (value, `file:line` or `--key`)."""
    found = _read_yaml(Path(recipe)) if recipe is not None else {}
    return found | _read_options(options)


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
            recipe = option.endswith((".yaml", ".yml"))
            hint = f"; a recipe is --config {option}" if recipe else ""
            raise ValueError(f"expected --key value, got {option!r}{hint}")
        name, equals, text = option[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if not text.strip():
            raise ValueError(f"--{name} must have a value (null for none), got {text!r}")
        try:
            value = as_written(parse_yaml(text, f"--{name}"), text.strip())
        except ValueError:
            value = text
        found[name] = (value, f"--{name}")
    return found


def _suggestion(key: str) -> str:
    near = _OTHER_NAMES.get(key) or closest(key, known_keys())
    whose = ", which only `compact compare` takes" if key in field_types(ComparisonConfig) else ""
    return whose + (f"; did you mean {near!r}?" if near else "")
