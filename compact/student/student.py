"""The student: a causal LM, split into its body and its LM head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compact.student.internals import (
    can_be_checkpointed,
    is_checkpointed,
    is_sharded,
    version_of,
)
from compact_ops import TokenStats, linear_token_stats


@dataclass(frozen=True)
class Student:
    """A causal LM as body and head, with logits softcap(logit_scale * hidden @ weight.T + bias).

    Attributes:
        model: the whole model, possibly wrapped by peft.
        body: the module from token ids to final hidden states, with its peft adapters.
        head: the linear layer of the LM head.
        config: the config of the text model.
        softcap: c of softcap(z) = c tanh(z / c); None if the model has no softcap.
        logit_scale: the factor on hidden @ weight.T.
        processing_class: the tokenizer, or None. Some metrics need it to look up words.
    """

    model: nn.Module
    body: nn.Module
    head: nn.Module
    config: Any
    softcap: float | None
    logit_scale: float
    processing_class: PreTrainedTokenizerBase | None
    _cast: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: nn.Module, processing_class: PreTrainedTokenizerBase | None = None
    ) -> Student:
        """Splits a model, and checks on four tokens that its logits follow the formula above.

        Args:
            model: a causal LM of transformers, possibly wrapped by peft.
            processing_class: its tokenizer; the metrics `probe` and `probe-released` need it.

        Raises:
            TypeError: `model` is not a model of transformers, or a peft wrapper of one.
            ValueError: the logits do not follow the formula: an adapter on the head, prompt tuning,
                a head that is not one linear layer, or another formula.
        """
        base: Any = _unwrap(model)  # transformers leaves the methods used below without types
        config = base.config.get_text_config()
        head = base.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"model must have an LM head, but get_output_embeddings() of {type(base).__name__} "
                "returned None"
            )
        linear = _active(head)
        if hasattr(linear, "lora_A") or not isinstance(linear, nn.Linear):
            raise ValueError(
                "the LM head must be one linear layer without adapter, got "
                f"{type(linear).__name__}; take it out of target_modules, and leave "
                "trainable_token_indices out for a head that is tied to the embedding"
            )
        body = base.get_decoder()
        if body is None or body is base:
            raise ValueError(
                f"model must have a body apart from its head, but get_decoder() of "
                f"{type(base).__name__} returned {'None' if body is None else 'the model itself'}"
            )
        student = cls(
            model=model,
            body=body,
            head=head,
            config=config,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=_logit_scale(config),
            processing_class=processing_class,
        )
        student._check_logits(base)
        return student

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ValueError: the student was made without one.
        """
        if self.processing_class is None:
            raise ValueError("processing_class must be given to Student.of, got None")
        return self.processing_class

    @property
    def pad_token_id(self) -> int:
        """The token that pads rows, see `padding_id`."""
        own = self.processing_class
        return 0 if own is None else padding_id(own, self.weight.shape[0])

    @property
    def weight(self) -> Tensor:
        """[V, H] weight of the head; the embedding itself if the two are tied."""
        weight: Tensor = _active(self.head).weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V] bias of the head, or None."""
        bias: Tensor | None = _active(self.head).bias
        return bias

    def head_inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states and weight of the head, in the dtype in which they are multiplied.

        That is autocast's where it is on: there, torch's own layers multiply in it, and float32
        products take about twelve times as long on a GPU. The operators still add in float32. The
        copy of a weight that is not trained is kept.

        Args:
            hidden: [..., H] final hidden states.
        """
        weight, device = self.weight, hidden.device.type
        if (dtype := autocast_dtype(device)) is None:
            return hidden, weight
        if weight.requires_grad or is_sharded(self.head):
            return hidden.to(dtype), weight.to(dtype)
        state = (dtype, weight.data_ptr(), version_of(weight))
        if self._cast.get("state") != state:
            self._cast.update(state=state, weight=weight.to(dtype))
        return hidden.to(dtype), self._cast["weight"]

    def token_stats(self, hidden: Tensor, target: Tensor, **options: Any) -> TokenStats:
        """Returns the statistics of tokens under this head.

        Args:
            hidden: [..., H] final hidden states.
            target: [M] token ids; as all options, see `compact_ops.linear_token_stats`.
            options: its other arguments, but those of the head.
        """
        return linear_token_stats(
            *self.head_inputs(hidden.flatten(0, -2)),
            target,
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            **options,
        )

    @cached_property
    def learned_positions(self) -> int | None:
        """The positions that the model has learned a table for; None without a table."""
        return learned_positions(self.model)

    @cached_property
    def steady_positions(self) -> int | None:
        """The most tokens of a text that does not change how the rest of its batch is read.

        With the rotary positions longrope and dynamic, a longer text changes the frequencies of the
        whole batch. None for all other models, where no text does.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        several = [part for part in rope.values() if isinstance(part, dict)]  # one a layer type
        found = []
        for part in several or [rope]:
            kind = part.get("rope_type") or ""
            if kind == "longrope":
                found.append(part["original_max_position_embeddings"])
            elif "dynamic" in kind:
                found.append(self.config.max_position_embeddings)
        return min(map(int, found), default=None)

    @property
    def trains_head(self) -> bool:
        """Whether the weight of the head requires a gradient."""
        return self.weight.requires_grad

    @property
    def checkpoints(self) -> bool:
        """Whether gradient checkpointing is on: layers run a second time in the backward."""
        return any(map(is_checkpointed, self.checkpointable))

    @cached_property
    def checkpointable(self) -> tuple[nn.Module, ...]:
        """The modules of the body in which gradient checkpointing can be switched on.

        They are found once: a walk over the modules of a peft model takes milliseconds.
        """
        return tuple(filter(can_be_checkpointed, self.body.modules()))

    @property
    def attention_window(self) -> int | None:
        """The smallest sliding window or chunk of any layer in tokens; None if unlimited."""
        layer_types = getattr(self.config, "layer_types", None)
        reach = []
        window = getattr(self.config, "sliding_window", None)
        slides = "sliding_attention" in layer_types if layer_types else True
        if window is not None and slides and getattr(self.config, "use_sliding_window", True):
            reach.append(int(window))
        chunk = getattr(self.config, "attention_chunk_size", None)
        if chunk is not None and (not layer_types or "chunked_attention" in layer_types):
            reach.append(int(chunk))
        return min(reach, default=None)

    def last_attention(self) -> nn.Module:
        """Returns the attention module of the last layer, which has q_proj and k_proj.

        Raises:
            ValueError: the model has no separate query and key projections.
        """
        found = [m for m in self.body.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
        if not found:
            raise ValueError(f"{type(self.body).__name__} has no q_proj and k_proj")
        return found[-1]

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Within the context, every rank holds the whole weights of a module that FSDP2 shards.

        All ranks must enter it. Without FSDP2 it does nothing.
        """
        shards = [m for m in self.body.modules() if isinstance(m, FSDPModule)]
        own = [m for m in shards if any(inner is module for inner in m.modules())]
        if own:
            own[-1].unshard()  # the innermost
        try:
            yield
        finally:
            if own:
                own[-1].reshard()

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] of hidden states [..., H] by the formula; for small inputs."""
        z = nn.functional.linear(hidden, self.weight) * self.logit_scale
        if self.bias is not None:
            z = z + self.bias
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    @torch.no_grad()
    def _check_logits(self, base: Any) -> None:
        """Compares the model's logits with the formula's on four tokens.

        Without this check, a scale or cap that this file does not handle would silently give a
        wrong loss.

        Raises:
            ValueError: they differ, or the model computes its logits without `body`.
        """
        device = self.weight.device
        ids = torch.arange(4, device=device)[None] % self.weight.shape[0]
        seen: list[Tensor] = []
        hook = self.body.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        try:
            want = base(input_ids=ids, use_cache=False).logits.float()
        except (TypeError, ValueError) as failure:
            reason = (str(failure).splitlines() or [""])[0][:200]
            raise ValueError(
                f"model: {type(base).__name__} must run on token ids alone: {reason}"
            ) from failure
        finally:
            hook.remove()
        if not seen:
            raise ValueError(
                f"model must compute its logits with its body, but {type(base).__name__} does not "
                f"call {type(self.body).__name__}"
            )
        if seen[0].shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"model must have a body that gives hidden states of {self.weight.shape[1]} "
                f"numbers, as its head reads, but get_decoder() of {type(base).__name__} returned "
                f"{type(self.body).__name__}, which gives {seen[0].shape[-1]}"
            )
        got = self.logits(seen[0]).float()
        error = (got - want).norm() / want.norm().clamp_min(1e-12)
        tolerance = 1e-3 if seen[0].dtype == torch.float32 else 3e-2
        if not error <= tolerance:
            raise ValueError(
                f"model: the logits of {type(base).__name__} are not covered, they must be "
                f"softcap(logit_scale * hidden @ weight.T + bias) with softcap {self.softcap} and "
                f"logit_scale {self.logit_scale}; the relative difference is {float(error):.2g}"
            )


def autocast_dtype(device: str) -> torch.dtype | None:
    """Returns the dtype of autocast on a type of device, or None outside of it."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode; afterwards each module has its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def padding_id(processing_class: Any, rows: int) -> int:
    """Returns the token that pads rows: the tokenizer's padding token, else its end token, else 0.

    If the embedding has no row for that token, it is 0. No token attends to padding, so any
    token will do.

    Args:
        processing_class: the tokenizer.
        rows: number of rows of the embedding.
    """
    found = processing_class.pad_token_id
    found = processing_class.eos_token_id if found is None else found
    return int(found) if found is not None and found < rows else 0


def learned_positions(model: Any) -> int | None:
    """Returns the positions of a model that has a table of them, as GPT-2; None without one.

    A token beyond the table has no embedding. Rotary positions have no table.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and BART keep two rows of the table for themselves.
    found = any(table.num_embeddings - int(known or 0) in (0, 2) for table in tables)
    return int(known) if known is not None and found else None


def _unwrap(model: Any) -> PreTrainedModel:
    """Returns the transformers model inside a peft wrapper; its layers hold the adapters."""
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        for name, peft_config in model.peft_config.items():
            if getattr(peft_config, "is_prompt_learning", False):
                raise ValueError(
                    f"adapter {name!r} is prompt learning ({peft_config.peft_type}), which changes "
                    "the tokens of a row; use LoRA or train the whole model"
                )
            if getattr(peft_config, "alora_invocation_tokens", None):
                raise ValueError(
                    f"adapter {name!r} is an activated LoRA (alora_invocation_tokens), which is "
                    "off until a row has those tokens; use LoRA without them"
                )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model


def _active(head: Any) -> Any:
    """Returns the linear layer in use; peft's `modules_to_save` holds several."""
    if hasattr(head, "modules_to_save"):
        for name in head.active_adapters:
            if name in head.modules_to_save:
                return head.modules_to_save[name]
        return head.original_module
    return head


def _logit_scale(config: Any) -> float:
    """Returns the factor on the logits: Cohere multiplies (logit_scale), Granite divides."""
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 / float(scaling) if scaling is not None else 1.0
