"""Settings that need neither torch nor transformers: model, data, LoRA, and what to compare.

So a command can refuse a recipe, a used folder or a missing file before it loads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, dataclass, field
from typing import Any, Literal

from compact.options import check_numbers

OUTPUT_DIR = "runs/compact"
"""The default folder of a run."""
DEFAULT_PRESET = "robust"
"""The default preset."""
MAX_LENGTH = 2560
"""Longest prompt plus completion by default, in tokens."""
LEAF_BUDGET = 0.25
"""Most tokens of answer leaves, as a share of a row's tokens, by default."""


def option(default: Any, text: str) -> Any:
    """Returns a dataclass field with its meaning for the docs; a list as default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def as_markdown(options: Iterable[Field[Any]]) -> str:
    """Returns a table of options for the docs."""
    lines = ["| name | default | meaning |", "|---|---|---|"]
    for one in options:
        default = one.default_factory() if callable(one.default_factory) else one.default
        shown = "" if default is None else f"`{_as_yaml(default)}`"
        lines.append(f"| `{one.name}` | {shown} | {one.metadata['help']} |")
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_RECIPE_LIMITS: dict[str, dict[str, Any]] = {
    "max_problems": {"least": 1, "whole": True},
    "lora_r": {"least": 1, "most": 65536, "whole": True},
    "lora_alpha": {"least": 1, "whole": True},
    "lora_dropout": {"least": 0, "below": 1},
}
_COMPARISON_LIMITS: dict[str, dict[str, Any]] = {
    "tokens": {"least": 1, "whole": True},
    "max_new_tokens": {"least": 1, "whole": True},
    "development": {"least": 0, "whole": True},
}


def check_output_dir(value: str | None) -> None:
    """Raises ValueError if a setting names no folder."""
    if not str(value or "").strip() or "\0" in str(value):
        raise ValueError(f"output_dir must name a folder, got {value!r}")


@dataclass
class ComparisonConfig:
    """The keys that a recipe may have for `compact compare`, besides those of training.

    Attributes:
        tests: files of test questions or preference pairs; the first gives the accuracy.
        arms: presets or policies, with settings after commas.
        seeds: each arm is run once per seed.
        tokens: completion tokens of each run.
        development: problems held out to choose among the arms of one teacher, not trained on.
        retained: texts; shows what each arm makes the student forget.
        max_new_tokens: most tokens of an answer to a test question.
    """

    tests: list[str] | None = None
    arms: list[str] | None = None
    seeds: list[int] | None = None
    tokens: int | None = None
    development: int = 0
    retained: str | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        check_numbers(self, _COMPARISON_LIMITS)
        for name in ("tests", "arms", "seeds"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} must not be empty")


@dataclass
class RecipeConfig:
    """The keys of a recipe that are not settings of the trainer: model, data and LoRA."""

    model: str | None = option(
        None, "the student: a name on the hub, a folder (also of a run) or a .gguf file; needed"
    )
    data: str | None = option(
        None, "rationales to train on ([kinds of files](data-format.md)); needed"
    )
    eval_data: str | None = option(
        None,
        "rationales to report the loss on, after each epoch unless `eval_strategy` says otherwise",
    )
    max_problems: int | None = option(None, "train on the first n problems only")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "number format of the student's weights (`auto`: that of its files)"
    )
    use_peft: bool = option(True, "`true` trains LoRA matrices, `false` every weight")
    lora_r: int = option(16, "rank of the LoRA matrices")
    lora_alpha: int = option(32, "the update of LoRA is multiplied by `lora_alpha / lora_r`")
    lora_dropout: float = option(0.1, "dropout before the LoRA matrices")
    lora_target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get LoRA matrices, or `all-linear`; by default the linear layers of Llama, "
        "Qwen and Gemma",
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        check_numbers(self, _RECIPE_LIMITS)
        if not self.lora_target_modules or not all(self.lora_target_modules):
            raise ValueError(
                f"lora_target_modules must name layers, got {self.lora_target_modules!r}"
            )
        for name in ("model", "data", "eval_data"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or "\0" in value):
                raise ValueError(f"{name} must be a name or a path, got {value!r}")
