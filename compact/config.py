"""Settings: `CompactConfig` for the trainer, `RecipeConfig` for model, data and LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from compact.sft_names import check_fields, takes_trl_names


def _option(default: Any, text: str) -> Any:
    """Returns a dataclass field with a line of help; a list as default is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


_ANY = math.inf
# Setting -> (least, most); the limits of transformers' settings, which it does not check itself.
# A step count of `*_steps` below 1 is a share of all steps.
_RANGES = {
    "max_length": (2, _ANY),
    "max_row_length": (2, _ANY),
    "leaf_every": (1, _ANY),
    "per_device_train_batch_size": (1, _ANY),
    "per_device_eval_batch_size": (1, _ANY),
    "gradient_accumulation_steps": (1, _ANY),
    "learning_rate": (0, _ANY),
    "weight_decay": (0, _ANY),
    "max_grad_norm": (0, _ANY),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, _ANY),
    "warmup_steps": (0, _ANY),
    "num_train_epochs": (-1, _ANY),
    "max_steps": (-1, _ANY),
    "save_steps": (1e-9, _ANY),
    "eval_steps": (1e-9, _ANY),
    "logging_steps": (1e-9, _ANY),
    "save_total_limit": (1, _ANY),
    "eval_delay": (0, _ANY),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, _ANY),
}
_RECIPE_RANGES = {
    "max_problems": (1, _ANY),
    "lora_r": (1, 65536),
    "lora_alpha": (1, _ANY),
    "lora_dropout": (0, 0.999),
}
# optim -> the names that transformers reads from optim_args; other optimizers read none.
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")


def _check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
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
            limits = f"at least {least:g}" if most == _ANY else f"from {least:g} to {most:g}"
            limits = "above 0" if least == 1e-9 else limits
            raise ValueError(f"{name} must be {limits}, got {value}")


def _check_optim_args(given: str | None, optim: Any) -> None:
    """Raises ValueError for arguments that the optimizer would ignore."""
    name = str(getattr(optim, "value", optim))
    if not given or not (name in _OPTIM_ARGS or name in _WITHOUT_ARGS):
        return
    known = _OPTIM_ARGS.get(name, ())
    for pair in given.replace(" ", "").split(","):
        key, equals, _ = pair.partition("=")
        if key not in known or not equals:
            expected = f"key=value with {', '.join(known)}" if known else "empty"
            raise ValueError(f"optim_args must be {expected} with optim {name}, got {pair!r}")


@takes_trl_names
@dataclass
class CompactConfig(TrainingArguments):
    """Training settings. Batch sizes count problems; a problem brings all its rationales.

    Some defaults differ from those of transformers. They are the settings of the method's published
    training run: a constant learning rate of 1e-5, one problem per micro-batch, four micro-batches
    per step, five epochs. Names that only TRL's SFTConfig has are taken or refused as
    `compact.sft_names` says.
    """

    # transformers reads these fields as JSON if they are strings, as on its own command line.
    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "overrides",
        "strategy_options",
        "model_init_kwargs",
    ]

    preset: str = _option(
        "robust",
        "how teachers are weighted: a preset (released, paper, robust) or a policy (uniform, "
        "random, single:TEACHER, answer-vote, rejection, ...; `compact metrics` lists all)",
    )
    overrides: dict[str, Any] | str | None = _option(
        None, "settings of the preset to change, such as {tau: 0.5, consensus: answer}"
    )
    token_weights: str = _option(
        "none",
        "what each token's loss is multiplied by, besides the rationale's weight: none, dft, eaft, "
        "cll, or a registered name",
    )
    max_length: int = _option(2560, "longest prompt plus completion, in tokens")
    strategy: str | None = _option(
        None, "distillation method besides the weighting: the name of a registered strategy"
    )
    strategy_options: dict[str, Any] | str | None = _option(None, "arguments of the strategy")
    layout: Literal["auto", "tree", "padded"] = _option(
        "auto",
        "tree: a problem is one row, its rationales are branches; padded: each rationale is a row",
    )
    max_row_length: int | None = _option(
        None,
        "tree: a problem with more tokens than this is packed over several rows, each with the "
        "prompt; by default it is one row",
    )
    leaf_every: int = _option(
        1, "run answer leaves every n-th step; in between, a problem keeps its last levels"
    )
    leaf_budget: float = _option(
        0.25,
        "most tokens of answer leaves, as a share of a row's; where all steps would take more, "
        "fewer are asked about",
    )
    head_grad: Literal["auto", "frozen", "stash", "recompute"] = _option(
        "auto", "how the gradient of the LM head is computed; see compact_ops.linear_token_stats"
    )
    filter_eps: float = _option(
        0.0,
        "in the gradient product of the head, softmax entries below this value are rounded to 0 "
        "or to this value, at random and without bias; 0 is exact",
    )
    on_nonfinite: Literal["stop", "skip"] = _option(
        "stop",
        "if a loss or gradient is not finite: stop the run, or skip the micro-batch (with "
        "several processes, the whole step)",
    )
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "arguments of from_pretrained, if the model is given by name"
    )

    # The defaults differ from transformers, the meaning does not.
    output_dir: str | None = _option("runs/compact", "folder for checkpoints, scores and the model")
    learning_rate: float = _option(1e-5, "peak learning rate")
    lr_scheduler_type: SchedulerType | str = _option("constant", "learning-rate schedule")
    num_train_epochs: float = _option(5.0, "passes over the problems")
    per_device_train_batch_size: int = _option(1, "problems per micro-batch and rank")
    per_device_eval_batch_size: int = _option(1, "the same, in evaluation")
    gradient_accumulation_steps: int = _option(4, "micro-batches per optimizer step")
    logging_steps: float = _option(1, "steps between two lines of the log")
    resume_from_checkpoint: str | bool | None = _option(  # type: ignore[assignment]  # bool is missing
        None, "checkpoint to resume from; true takes the newest undamaged one of output_dir"
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the setting, what was expected and what was found.
        """
        _check_ranges(self, _RANGES)
        if not str(self.output_dir or "").strip() or "\0" in str(self.output_dir):
            raise ValueError(f"output_dir must name a folder, got {self.output_dir!r}")
        if self.load_best_model_at_end and str(self.eval_strategy).lower().endswith("no"):
            raise ValueError(
                "load_best_model_at_end needs an evaluation: set eval_strategy and save_strategy "
                "to the same of steps and epoch, got eval_strategy no"
            )
        _check_optim_args(self.optim_args, self.optim)
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if not self.leaf_budget > 0.0:
            raise ValueError(f"leaf_budget must be above 0, got {self.leaf_budget}")
        if not 0.0 <= self.filter_eps < 1.0:
            raise ValueError(f"filter_eps must be in [0, 1), got {self.filter_eps}")
        for name, allowed in (
            ("layout", ("auto", "tree", "padded")),
            ("head_grad", ("auto", "frozen", "stash", "recompute")),
            ("on_nonfinite", ("stop", "skip")),
            ("train_sampling_strategy", ("random", "sequential")),
        ):
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {found!r}")
        if self.max_row_length is not None and self.max_row_length < self.max_length:
            raise ValueError(
                f"max_row_length must be at least max_length = {self.max_length}, so that a row "
                f"holds a prompt and a rationale, got {self.max_row_length}"
            )
        check_fields(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("overrides", "strategy_options", "model_init_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping, got {value!r}")


@dataclass
class ComparisonConfig:
    """The keys that a recipe may have for `compact compare`, besides those of training."""

    tests: list[str] | None = _option(None, "files of test questions; the first gives the accuracy")
    arms: list[str] | None = _option(None, "presets or policies, with settings after commas")
    seeds: list[int] | None = _option(None, "each arm is run once per seed")
    tokens: int | None = _option(None, "completion tokens of each run")
    development: int = _option(
        0, "problems held out to choose among the arms of one teacher, not trained on"
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        _check_ranges(self, {"tokens": (1, _ANY), "development": (0, _ANY)})
        for name in ("tests", "arms", "seeds"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} must not be empty")


@dataclass
class RecipeConfig:
    """The keys of a recipe that are not settings of the trainer: model, data and LoRA."""

    model: str | None = _option(
        None, "the student: a name on the hub, a folder (also of a run) or a .gguf file"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _option(
        "float32", "dtype of the student's weights; auto takes the dtype of its files"
    )
    data: str | None = _option(
        None, "rationales to train on; docs/data-format.md lists the kinds of files"
    )
    eval_data: str | None = _option(
        None,
        "rationales to compute the eval loss on, after each epoch unless eval_strategy is set",
    )
    max_problems: int | None = _option(None, "train on the first n problems only")
    use_peft: bool = _option(True, "true trains LoRA matrices, false trains every weight")
    lora_r: int = _option(16, "rank of the LoRA matrices")
    lora_alpha: int = _option(32, "LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = _option(0.1, "dropout before the LoRA matrices")
    lora_target_modules: list[str] = _option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get LoRA matrices, or all-linear",
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the key, what was expected and what was found.
        """
        _check_ranges(self, _RECIPE_RANGES)
        if not self.lora_target_modules or not all(self.lora_target_modules):
            raise ValueError(
                f"lora_target_modules must name layers, got {self.lora_target_modules!r}"
            )
        for name in ("model", "data", "eval_data"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or "\0" in value):
                raise ValueError(f"{name} must be a name or a path, got {value!r}")
