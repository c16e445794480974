"""Settings that need neither torch nor transformers: model, data, LoRA, and what to compare.

So a command can refuse a recipe, a used folder or a missing file before it loads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OUTPUT_DIR = "runs/compact"
"""The default folder of a run."""
DEFAULT_PRESET = "robust"
"""The default preset."""
LEAF_BUDGET = 0.25
"""Most tokens of answer leaves, as a share of a row's tokens, by default."""


def option(default: Any, text: str) -> Any:
    """Returns a dataclass field with a line of help; a list as default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


ANY = math.inf
_RECIPE_RANGES = {
    "max_problems": (1, ANY),
    "lora_r": (1, 65536),
    "lora_alpha": (1, ANY),
    "lora_dropout": (0, 0.999),
}


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raises ValueError for the first setting that is not a finite number in its range."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name, None)
        if value is None and name != "max_length":
            continue
        if (
            not isinstance(value, int | float)
            or not math.isfinite(value)
            or not least <= value <= most
        ):
            limits = f"at least {least:g}" if most == ANY else f"from {least:g} to {most:g}"
            limits = "above 0" if least == 1e-9 else limits
            raise ValueError(f"{name} must be {limits}, got {value}")


def check_output_dir(value: str | None) -> None:
    """Raises ValueError if a setting names no folder."""
    if not str(value or "").strip() or "\0" in str(value):
        raise ValueError(f"output_dir must name a folder, got {value!r}")


@dataclass
class ComparisonConfig:
    """The keys that a recipe may have for `compact compare`, besides those of training."""

    tests: list[str] | None = option(
        None, "files of test questions or preference pairs; the first gives the accuracy"
    )
    arms: list[str] | None = option(None, "presets or policies, with settings after commas")
    seeds: list[int] | None = option(None, "each arm is run once per seed")
    tokens: int | None = option(None, "completion tokens of each run")
    development: int = option(
        0, "problems held out to choose among the arms of one teacher, not trained on"
    )
    retained: str | None = option(None, "texts; shows what each arm makes the student forget")
    max_new_tokens: int = option(256, "most tokens of an answer to a test question")

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        positive = (1, ANY)
        ranges = {"tokens": positive, "max_new_tokens": positive, "development": (0, ANY)}
        check_ranges(self, ranges)
        for name in ("tests", "arms", "seeds"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} must not be empty")


@dataclass
class RecipeConfig:
    """The keys of a recipe that are not settings of the trainer: model, data and LoRA."""

    model: str | None = option(
        None, "the student: a name on the hub, a folder (also of a run) or a .gguf file"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "dtype of the student's weights; auto takes the dtype of its files"
    )
    data: str | None = option(
        None, "rationales to train on; docs/data-format.md lists the kinds of files"
    )
    eval_data: str | None = option(
        None,
        "rationales to compute the eval loss on, after each epoch unless eval_strategy is set",
    )
    max_problems: int | None = option(None, "train on the first n problems only")
    use_peft: bool = option(True, "true trains LoRA matrices, false trains every weight")
    lora_r: int = option(16, "rank of the LoRA matrices")
    lora_alpha: int = option(32, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = option(0.1, "dropout before the LoRA matrices")
    lora_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get LoRA matrices, or all-linear",
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        check_ranges(self, _RECIPE_RANGES)
        if not self.lora_target_modules or not all(self.lora_target_modules):
            raise ValueError(
                f"lora_target_modules must name layers, got {self.lora_target_modules!r}"
            )
        for name in ("model", "data", "eval_data"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or "\0" in value):
                raise ValueError(f"{name} must be a name or a path, got {value!r}")
