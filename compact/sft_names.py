"""TRL's names: settings of SFTConfig and arguments of SFTTrainer, and what becomes of each here.

A name is accepted with its meaning, or refused in one line that says what to do. The tables below
are the only place that knows them: `CompactConfig`, `CompactTrainer` and recipes ask them, and
docs/trainer.md shows them (`as_markdown`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_Config = TypeVar("_Config")
ANY = ("any",)
"""Every value is accepted."""


@dataclass(frozen=True)
class Name:
    """What becomes of a name.

    Attributes:
        accepted: the values that are accepted, `ANY` for every one.
        meaning: what an accepted value does.
        instead: what to do instead of giving another value; "" if every value is accepted.
        becomes: (value or None for any) -> the field here, and its value or None for the same.
    """

    accepted: tuple[Any, ...]
    meaning: str
    instead: str = ""
    becomes: tuple[Any, str, Any] | None = None

    def fields(self, name: str, value: Any) -> dict[str, Any]:
        """Returns the fields here that stand for a value.

        Raises:
            ValueError: the value is refused.
        """
        if self.becomes is not None and self.becomes[0] in (None, value):
            _, field, fixed = self.becomes
            return {field: value if fixed is None else fixed}
        if self.accepted is ANY or any(value is x or value == x for x in self.accepted):
            return {}
        wanted = " or ".join(_shown(x) for x in self.accepted)
        shown = repr(value) if isinstance(value, str | int | float | dict) else _kind(value)
        raise ValueError(f"{name} must be {wanted}: {self.instead}, got {shown[:60]}")


def _shown(value: Any) -> str:
    return str(value) if value is None or isinstance(value, bool | float) else repr(value)


def _kind(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))


_NO_EFFECT = "no effect"
_TOKENIZER = "set it on the tokenizer and give that as processing_class"
_COMPILE = "batches change their shape at each step, so that it would compile without end"
_FREE = "layout: tree packs problems into rows; no problem sees another"

SETTINGS: dict[str, Name] = {
    "activation_offloading": Name((False,), "", "gradient_checkpointing saves memory too"),
    "assistant_only_loss": Name(
        (False,), "", "leave it out; the loss covers the completion, the last message of a row"
    ),
    "auto_find_batch_size": Name((False,), "", "set per_device_train_batch_size"),
    "batch_eval_metrics": Name((False,), "", "there is no compute_metrics, see there"),
    "bf16_full_eval": Name((False,), "", "load the student in bfloat16 (dtype)"),
    "chars_per_token": Name(ANY, f"{_NO_EFFECT}; it belongs to packing"),
    "chat_template_path": Name((None,), "", "set chat_template of the tokenizer"),
    "completion_only_loss": Name(
        (None, True), "the only loss here", "the prompt is not trained on; write it in completion"
    ),
    "dataset_batch_size": Name(ANY, f"{_NO_EFFECT}; rows are encoded in this process"),
    "dataset_kwargs": Name((None, {}), "", "leave it out; rows are encoded before the first step"),
    "dataset_num_proc": Name(ANY, f"{_NO_EFFECT}; rows are encoded in this process"),
    "dataset_text_field": Name(
        (None, "text"), _NO_EFFECT, "give rows with prompt and completion, or messages"
    ),
    "enable_jit_checkpoint": Name(
        (False,), "", "set save_steps; it would save in the middle of a step"
    ),
    "eos_token": Name((None,), "", _TOKENIZER),
    "eval_packing": Name((None, False), "", _FREE),
    "fp16_full_eval": Name((False,), "", "load the student in float16 (dtype)"),
    "include_for_metrics": Name(([], ()), "", "there is no compute_metrics, see there"),
    "label_smoothing_factor": Name((0, 0.0), "", "the loss is the weighted nll of the tokens"),
    "loss_type": Name(
        (None, "nll", "chunked_nll"),
        "the loss here, whose logits are never stored; `dft` becomes `token_weights: dft`",
        "use token_weights or a strategy",
        becomes=("dft", "token_weights", "dft"),
    ),
    "max_seq_length": Name(ANY, "becomes `max_length`", becomes=(None, "max_length", None)),
    "neftune_noise_alpha": Name(
        (None,), "", "its noise would reach the scores that the weights rest on"
    ),
    "num_of_sequences": Name(ANY, f"{_NO_EFFECT}; it belongs to packing"),
    "packing": Name((False,), "", _FREE),
    "packing_strategy": Name(ANY, f"{_NO_EFFECT}; it belongs to packing"),
    "pad_to_multiple_of": Name(ANY, f"{_NO_EFFECT} on the loss"),
    "pad_token": Name((None,), "", _TOKENIZER),
    "padding_free": Name((False,), "", _FREE),
    "router_aux_loss_coef": Name((None, 0, 0.0), "", "the balance loss of experts is not computed"),
    "shuffle_dataset": Name(ANY, f"{_NO_EFFECT}; every epoch has its own order (data_seed)"),
    "torch_compile": Name((False,), "", _COMPILE),
    "torch_compile_backend": Name((None,), "", _COMPILE),
    "torch_compile_mode": Name((None,), "", _COMPILE),
    "truncation_mode": Name(("keep_start",), "", "the end of a long rationale is cut"),
    "trust_remote_code": Name((False,), "", "set model_init_kwargs: {trust_remote_code: true}"),
    "use_liger_kernel": Name((False,), "", "head and loss are fused here already"),
}
"""The fields of TRL's SFTConfig (0.9 to 1.16) that `CompactConfig` lacks, and those fields of
transformers that are not followed here."""

ARGUMENTS: dict[str, Name] = {
    "compute_loss_func": Name((None,), "", "write a strategy (docs/extending.md)"),
    "compute_metrics": Name(
        (None,),
        "",
        "no logits are kept; the log has eval_loss and eval_nll of eval_dataset, `compact "
        "evaluate` the accuracy, and a callback's on_evaluate runs your own",
    ),
    "data_collator": Name((None,), "", "a batch is a list of problems; change the rows instead"),
    "formatting_func": Name(
        (None,), "", "give rows with prompt and completion, made with train_dataset.map(...)"
    ),
    "model_init": Name((None,), "", "give the model"),
    "optimizer_cls_and_kwargs": Name((None,), "", "give optimizers=(optimizer, None), or optim"),
    "preprocess_logits_for_metrics": Name((None,), "", "no logits are kept"),
    "quantization_config": Name(
        (None,), "", "set model_init_kwargs={'quantization_config': ...} and name the model"
    ),
    "tokenizer": Name(ANY, "becomes `processing_class`", becomes=(None, "processing_class", None)),
}
"""The arguments of SFTTrainer and transformers.Trainer that `CompactTrainer` lacks."""


def settings_of(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Returns settings with TRL's names replaced by the fields here.

    Args:
        given: name -> value.
        known: the fields here; they are kept, and so are names that TRL does not have.

    Raises:
        ValueError: a value is refused, or two names stand for one field.
    """
    known = set(known)
    found = {name: v for name, v in given.items() if name in known or name not in SETTINGS}
    for name in given.keys() - found.keys():
        for field, value in SETTINGS[name].fields(name, given[name]).items():
            if field in found:
                raise ValueError(f"{name} must not stand beside {field}, which it becomes")
            found[field] = value
    return found


def check_fields(config: Any) -> None:
    """Raises ValueError for a field of transformers with a value that is not followed here."""
    for name, rule in SETTINGS.items():
        if hasattr(config, name):
            rule.fields(name, getattr(config, name))


def takes_trl_names(cls: type[_Config]) -> type[_Config]:
    """Lets a dataclass of settings take TRL's names too, see `settings_of`."""
    own: Any = cls.__init__

    @functools.wraps(own)
    def init(self: Any, *args: Any, **given: Any) -> None:
        own(self, *args, **settings_of(given, type(self).__dataclass_fields__))

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def tokenizer_of(others: Mapping[str, Any], processing_class: Any) -> Any:
    """Returns the tokenizer, and checks the arguments that `CompactTrainer` itself lacks.

    Raises:
        ValueError: an argument is refused, or the tokenizer is given twice.
        TypeError: an argument is unknown, or is a setting.
    """
    for name, value in others.items():
        if name not in ARGUMENTS:
            where = "; settings belong into args=CompactConfig(...)" if name in SETTINGS else ""
            raise TypeError(f"CompactTrainer has no argument {name!r}{where}")
        for field, given in ARGUMENTS[name].fields(name, value).items():
            if processing_class is not None:
                raise ValueError(f"{name} must not stand beside {field}, which it becomes")
            processing_class = given
    return processing_class


def as_markdown(names: Mapping[str, Name]) -> str:
    """Returns a table of names for the docs."""
    lines = ["| name | accepted | otherwise |", "|---|---|---|"]
    for name, rule in sorted(names.items()):
        values = "any" if rule.accepted is ANY else ", ".join(map(_shown, rule.accepted))
        accepted = f"{values}: {rule.meaning}" if rule.meaning else values
        lines.append(f"| `{name}` | {accepted} | {rule.instead} |")
    return "\n".join(lines) + "\n"
