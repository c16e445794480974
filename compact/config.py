"""`CompactConfig`: the settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

from transformers import SchedulerType, TrainingArguments

from compact.options import check_number, check_numbers
from compact.settings import (
    DEFAULT_PRESET,
    LEAF_BUDGET,
    MAX_LENGTH,
    OUTPUT_DIR,
    check_output_dir,
    option,
)
from compact.sft_names import check_fields, takes_trl_names

# Setting -> its limits. transformers does not check its own. Shares are allowed for steps: what is
# below 1 is a share of all steps.
_LIMITS: dict[str, dict[str, Any]] = {
    "max_length": {"least": 2, "whole": True},
    "max_rationales_per_problem": {"least": 1, "whole": True},
    "max_row_length": {"least": 2, "whole": True},
    "leaf_every": {"least": 1, "whole": True},
    "leaf_budget": {"above": 0},
    "filter_eps": {"least": 0, "below": 1},
    "per_device_train_batch_size": {"least": 1, "whole": True},
    "per_device_eval_batch_size": {"least": 1, "whole": True},
    "gradient_accumulation_steps": {"least": 1, "whole": True},
    "learning_rate": {"least": 0},
    "weight_decay": {"least": 0},
    "max_grad_norm": {"least": 0},
    "adam_beta1": {"least": 0, "most": 1},
    "adam_beta2": {"least": 0, "most": 1},
    "adam_epsilon": {"least": 0},
    "warmup_steps": {"least": 0},
    "num_train_epochs": {"least": -1},
    "max_steps": {"least": -1, "whole": True},
    "save_steps": {"above": 0},
    "eval_steps": {"above": 0},
    "logging_steps": {"above": 0},
    "save_total_limit": {"least": 1, "whole": True},
    "eval_delay": {"least": 0},
    "seed": {"least": 0, "most": 2**32 - 1, "whole": True},
    "data_seed": {"least": 0, "most": 2**32 - 1, "whole": True},
    "dataloader_num_workers": {"least": 0, "whole": True},
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
        "how teachers are weighted: a preset or policy ([choosing](choosing.md), "
        "[method](method.md))",
    )
    overrides: dict[str, Any] | str | None = option(
        None, "fields of the preset to change: `{tau: 0.5, consensus: answer}`"
    )
    strategy: str | None = option(
        None,
        "a distillation method beside the weighting ([strategies](strategies.md)); "
        "`compact strategies` lists them",
    )
    strategy_options: dict[str, Any] | str | None = option(None, "arguments of the strategy")
    token_weights: str = option(
        "none",
        "what each token's loss is multiplied by, besides the weight of its rationale: `dft`, "
        "`eaft`, `cll` or your own ([metrics](metrics.md#token-weights))",
    )
    max_rationales_per_problem: int | None = option(
        None,
        "most rationales of a problem that are read: the most valid ones if the preset judges "
        "them, as `robust` does; equals are drawn. The same tokens then reach more problems, in "
        "more steps ([measured](results/study.md#fewer-rationales-of-more-problems)). With 1 there "
        "is nothing to weigh: leave the answer leaves out with `overrides: {adaptability: none}`",
    )
    max_length: int = option(MAX_LENGTH, "longest prompt plus completion, in tokens")
    layout: Literal["auto", "tree", "padded"] = option(
        "auto",
        "`tree`: a problem is one row and its rationales are branches. `padded`: one row a "
        "rationale. `auto` takes `tree` where the model accepts an arbitrary mask, and warns where "
        "it does not; so does `compact doctor`",
    )
    max_row_length: int | None = option(
        None,
        "in a tree, a problem with more tokens than this is packed over several rows, each with "
        "the question; at least `max_length`. By default a problem is one row "
        "([long rationales](#long-rationales))",
    )
    leaf_every: int = option(
        1,
        "run the answer leaves every n-th step; in between, a problem keeps what was measured at "
        "its last visit",
    )
    leaf_budget: float = option(
        LEAF_BUDGET,
        "most tokens of answer leaves, as a share of a row's tokens. Where a leaf after every step "
        "would take more, fewer steps get one: they are spread evenly and include the last. In "
        "padded rows a leaf repeats the prompt and the rationale up to its step, which counts too. "
        "The log says how many",
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "arguments of `from_pretrained` if the model is given by name, such as "
        "`{attn_implementation: eager}`. `dtype` is float32 unless set here, or by the key `dtype` "
        "of a recipe",
    )
    head_grad: Literal["auto", "frozen", "stash", "recompute"] = option(
        "auto", "how the LM head's gradient is computed ([operators](operators.md))"
    )
    filter_eps: float = option(
        0.0,
        "softmax entries below this are rounded to 0 or to this value, at random and without "
        "bias, in the head's gradient",
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "what a loss or gradient that is not finite does. `stop` ends the run. `skip` leaves out "
        "the micro-batch (with several processes: the step). Both name the problem",
    )

    # The defaults differ from transformers, the meaning does not.
    output_dir: str | None = OUTPUT_DIR
    learning_rate: float = 1e-5
    lr_scheduler_type: SchedulerType | str = "constant"
    num_train_epochs: float = 5.0
    per_device_train_batch_size: int = 1  # problems
    per_device_eval_batch_size: int = 1
    gradient_accumulation_steps: int = 4
    logging_steps: float = 1
    resume_from_checkpoint: str | bool | None = None  # type: ignore[assignment]  # bool is missing

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: names the setting, what was expected and what was found.
        """
        check_numbers(self, _LIMITS)
        check_output_dir(self.output_dir)
        if self.load_best_model_at_end and str(self.eval_strategy).lower().endswith("no"):
            raise ValueError(
                "load_best_model_at_end needs an evaluation: set eval_strategy and save_strategy "
                "to the same of steps and epoch, got eval_strategy no"
            )
        _check_optim_args(self.optim_args, self.optim)
        if self.max_steps <= 0:
            check_number("num_train_epochs", self.num_train_epochs, above=0)
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
