"""`CompactConfig`: the settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from compact.settings import (
    ANY,
    DEFAULT_PRESET,
    LEAF_BUDGET,
    OUTPUT_DIR,
    check_output_dir,
    check_ranges,
    option,
)
from compact.sft_names import check_fields, takes_trl_names

# Setting -> (least, most); the limits of transformers' settings, which it does not check itself.
# A step count of `*_steps` below 1 is a share of all steps.
_RANGES = {
    "max_length": (2, ANY),
    "max_rationales_per_problem": (1, ANY),
    "max_row_length": (2, ANY),
    "leaf_every": (1, ANY),
    "per_device_train_batch_size": (1, ANY),
    "per_device_eval_batch_size": (1, ANY),
    "gradient_accumulation_steps": (1, ANY),
    "learning_rate": (0, ANY),
    "weight_decay": (0, ANY),
    "max_grad_norm": (0, ANY),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, ANY),
    "warmup_steps": (0, ANY),
    "num_train_epochs": (-1, ANY),
    "max_steps": (-1, ANY),
    "save_steps": (1e-9, ANY),
    "eval_steps": (1e-9, ANY),
    "logging_steps": (1e-9, ANY),
    "save_total_limit": (1, ANY),
    "eval_delay": (0, ANY),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, ANY),
}
# optim -> the names that transformers reads from optim_args; other optimizers read none.
_OPTIM_ARGS = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
_WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")


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

    preset: str = option(
        DEFAULT_PRESET,
        "how teachers are weighted: a preset (released, paper, robust) or a policy (uniform, "
        "random, single:TEACHER, answer-vote, rejection, ...; `compact metrics` lists all)",
    )
    overrides: dict[str, Any] | str | None = option(
        None, "settings of the preset to change, such as {tau: 0.5, consensus: answer}"
    )
    token_weights: str = option(
        "none",
        "what each token's loss is multiplied by, besides the rationale's weight: none, dft, eaft, "
        "cll, or a registered name",
    )
    max_rationales_per_problem: int | None = option(
        None,
        "most rationales of a problem that are read: the most valid ones if the preset judges "
        "them, equals by chance",
    )
    max_length: int = option(2560, "longest prompt plus completion, in tokens")
    strategy: str | None = option(
        None, "distillation method besides the weighting: the name of a registered strategy"
    )
    strategy_options: dict[str, Any] | str | None = option(None, "arguments of the strategy")
    layout: Literal["auto", "tree", "padded"] = option(
        "auto",
        "tree: a problem is one row, its rationales are branches; padded: each rationale is a row",
    )
    max_row_length: int | None = option(
        None,
        "tree: a problem with more tokens than this is packed over several rows, each with the "
        "prompt; by default it is one row",
    )
    leaf_every: int = option(
        1, "run answer leaves every n-th step; in between, a problem keeps its last levels"
    )
    leaf_budget: float = option(
        LEAF_BUDGET,
        "most tokens of answer leaves, as a share of a row's; where all steps would take more, "
        "fewer are asked about",
    )
    head_grad: Literal["auto", "frozen", "stash", "recompute"] = option(
        "auto", "how the gradient of the LM head is computed; see compact_ops.linear_token_stats"
    )
    filter_eps: float = option(
        0.0,
        "in the gradient product of the head, softmax entries below this value are rounded to 0 "
        "or to this value, at random and without bias; 0 is exact",
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "if a loss or gradient is not finite: stop the run, or skip the micro-batch (with "
        "several processes, the whole step)",
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "arguments of from_pretrained, if the model is given by name"
    )

    # The defaults differ from transformers, the meaning does not.
    output_dir: str | None = option(OUTPUT_DIR, "folder for checkpoints, scores and the model")
    learning_rate: float = option(1e-5, "peak learning rate")
    lr_scheduler_type: SchedulerType | str = option("constant", "learning-rate schedule")
    num_train_epochs: float = option(5.0, "passes over the problems")
    per_device_train_batch_size: int = option(1, "problems per micro-batch and rank")
    per_device_eval_batch_size: int = option(1, "the same, in evaluation")
    gradient_accumulation_steps: int = option(4, "micro-batches per optimizer step")
    logging_steps: float = option(1, "steps between two lines of the log")
    resume_from_checkpoint: str | bool | None = option(  # type: ignore[assignment]  # bool is missing
        None, "checkpoint to resume from; true takes the newest undamaged one of output_dir"
    )

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the setting, what was expected and what was found.
        """
        check_ranges(self, _RANGES)
        check_output_dir(self.output_dir)
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
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("nll"):
            self.greater_is_better = False  # as transformers sets it for names that end with loss
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.include_num_input_tokens_seen not in ("no", False):
            raise ValueError(
                "include_num_input_tokens_seen must be no: batches are problems, not token ids; "
                f"the score log has the tokens, got {self.include_num_input_tokens_seen!r}"
            )
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError(
                "split_batches of accelerator_config must be false, because every rank builds its "
                "own batches, got True"
            )
        for name in ("overrides", "strategy_options", "model_init_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping, got {value!r}")
            if name != "model_init_kwargs" and value:  # run.json holds no numbers of NumPy
                plain = {k: v.item() if isinstance(v, Number) and hasattr(v, "item") else v
                         for k, v in value.items()}  # fmt: skip
                setattr(self, name, plain)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as `run.json` and tracking services show them, without tokens."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        kwargs = found["model_init_kwargs"]
        if isinstance(kwargs, dict):
            hidden = {name: "<hidden>" for name in kwargs if str(name).endswith("token")}
            found["model_init_kwargs"] = kwargs | hidden
        return found
