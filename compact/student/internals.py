"""Every use of a private name of torch, transformers, peft or accelerate, each with its reason.

tests/student/test_internals.py tries each one out, so that a new version of a library fails there
with a message that names what changed. It also fails when another file of `compact` uses a private
name of a foreign library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
_CHECKPOINTING = "gradient_checkpointing"

TRAINER_METHODS = {
    # Overridden: transformers.Trainer has no public method for what these do.
    "_get_num_items_in_batch": ("batch_samples", "device"),  # a step counts problems, not tokens
    "_prepare_inputs": ("inputs",),  # items hold no tensors; batches are moved when they are built
    "_save": ("output_dir", "state_dict"),  # a tied weight of a sharded model is written once
    "_save_checkpoint": ("model", "trial"),  # written aside, listed with checksums, then renamed
    "save_model": ("output_dir", "_internal_call"),  # public, with a private parameter
    # Called: the steps of transformers' own _save_checkpoint.
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_save_scaler": ("output_dir",),
}
"""Methods of transformers.Trainer that trainer/trainer.py uses, and their parameters."""
TRAINER_PASSED_ON = ("_run_epoch",)  # skipped when a run is resumed at its last step
"""Methods of transformers.Trainer that trainer/trainer.py calls with whatever it was given."""
TRAINER_ATTRIBUTES = ("_train_batch_size",)
"""Private attributes of transformers.Trainer that trainer/trainer.py reads."""
CONFIG_ATTRIBUTES = ("_VALID_DICT_FIELDS",)
"""Private class attributes of transformers.TrainingArguments that config.py extends."""


def attention_implementation(config: Any) -> str:
    """Returns the name of the attention that a model's config selects. It has no public reader."""
    return str(config._attn_implementation)


@contextmanager
def attention_set_to(config: Any, implementation: str) -> Iterator[None]:
    """Within the context, the model of `config` uses another attention.

    The public setter checks the name against kernels of the hub and walks over all submodules. This
    takes longer than the forward of a small student. Here only the field that layers read is set.
    """
    own = config._attn_implementation
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = own


@contextmanager
def checkpointed_within(
    layers: Sequence[nn.Module], context: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within the context, layers that are checkpointed run in `context` now and in the backward.

    transformers keeps the function that checkpoints a layer in a private attribute of the layer. It
    has no public way to set up what the second run of a layer depends on.

    Args:
        layers: the layers, of which none, some or all are checkpointed.
        context: makes the context manager around each run of a layer.
    """
    name = "_gradient_checkpointing_func"
    layers = [layer for layer in layers if is_checkpointed(layer)]
    own = {layer: getattr(layer, name) for layer in layers if hasattr(layer, name)}

    def checkpoint(of_layer: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
        def inside(*args: Any) -> Any:
            with context():
                return run(*args)

        return of_layer(inside, *args)

    for layer, of_layer in own.items():
        setattr(layer, name, partial(checkpoint, of_layer))
    try:
        yield
    finally:
        for layer, of_layer in own.items():
            setattr(layer, name, of_layer)


def use_one_gpu(args: Any) -> None:
    """Prevents transformers from wrapping the model in DataParallel. The field has no setter."""
    args._n_gpu = 1


def let_cpu_ranks_shard() -> None:
    """Makes accelerate apply FSDP to CPU ranks.

    torch shards over gloo as it does over NCCL, but accelerate silently skips FSDP unless the
    state says that there are several accelerators.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


@contextmanager
def loading_whole() -> Iterator[None]:
    """Within the context, every process loads the whole model, also under ZeRO-3.

    Otherwise `from_pretrained` would leave each process with a part of it. But a student is checked
    and given adapters while it is whole, and is small enough for that. Public functions set and
    unset DeepSpeed's configuration; only reading it needs a private name.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    own = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if own is not None:
            deepspeed.set_hf_deepspeed_config(own)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2, or DeepSpeed by ZeRO-3, shares out parameters of the module.

    DeepSpeed has no public way to ask; it numbers the modules that it hooks.
    """
    return isinstance(module, FSDPModule) or "ds_id" in module.__dict__


def has_bf16_products() -> bool:
    """Whether oneDNN supports bfloat16 products on this CPU. torch has only a private op for it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def foreach_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the 2-norm of each tensor, by the fused op that torch's gradient clipping uses."""
    return torch._foreach_norm(list(tensors))


def foreach_multiply(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiplies each tensor by `factor` in place, by a fused op."""
    torch._foreach_mul_(list(tensors), factor)


def onednn_linear() -> Callable[..., Tensor] | None:
    """Returns oneDNN's linear layer, None without oneDNN.

    torch.compile calls this op. There is no public function that uses oneDNN in float32.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def saved_tensor_hooks() -> Hooks | None:
    """Returns the innermost (pack, unpack) hooks on the tensors that autograd saves.

    None without hooks. torch has a public way to set hooks, but none to read them.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def version_of(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place. Autograd's own check reads this counter."""
    return tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has a forward or backward hook. torch has no public function for it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_child(module: nn.Module, name: str) -> bool:
    """Whether the module has a child of this name. hasattr is slow where the name is missing."""
    return name in module._modules


def can_be_checkpointed(module: nn.Module) -> bool:
    """Whether gradient checkpointing can be switched on in the module."""
    return hasattr(module, _CHECKPOINTING)


def is_checkpointed(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in the module: it runs a second time in the backward."""
    # getattr of a module is slow where the name is missing.
    return bool(module.__dict__.get(_CHECKPOINTING, getattr(type(module), _CHECKPOINTING, False)))


def is_compiled(module: nn.Module) -> bool:
    """Whether Module.compile was called on the module."""
    return module._compiled_call_impl is not None
