"""Every use of a private name of torch, transformers, peft or accelerate, each with its reason.

tests/student/test_internals.py tries each out and says what broke when a new version breaks it; it
also fails when another file of `compact` reaches for a private name of a foreign library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

TRAINER_METHODS = {
    # Overridden: transformers.Trainer offers no public place for what these do.
    "_get_num_items_in_batch": ("batch_samples", "device"),  # the step counts problems, not tokens
    "_prepare_inputs": ("inputs",),  # items are no tensors; they move when they are packed
    "_save": ("output_dir", "state_dict"),  # tied weights of a sharded model, written once
    "_save_checkpoint": ("model", "trial"),  # staged, listed with checksums, then renamed
    # Called: the parts of _save_checkpoint that are transformers' own.
    "_get_output_dir": ("trial",),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_save_rng_state": ("output_dir",),
    "_save_scaler": ("output_dir",),
}
"""Private methods of transformers.Trainer that `CompactTrainer` uses, and their parameters."""
TRAINER_ATTRIBUTES = ("_train_batch_size",)
"""Private attributes of transformers.Trainer that `CompactTrainer` reads."""


def attention_implementation(config: Any) -> str:
    """Returns the attention of a model's config: there is no public way to read it."""
    return str(config._attn_implementation)


@contextmanager
def attention_set_to(config: Any, implementation: str) -> Iterator[None]:
    """Switches a model's attention while the context lasts.

    The public setter checks the name against hub kernels and walks over submodules, which takes
    longer than the forward of a small student; this one sets the field that layers read.
    """
    own = config._attn_implementation
    config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = own


def use_one_gpu(args: Any) -> None:
    """Keeps transformers from wrapping the model in DataParallel; the field has no setter."""
    args._n_gpu = 1


def let_cpu_ranks_shard() -> None:
    """Makes accelerate apply FSDP to ranks on CPUs, where it would leave it out without a word.

    torch shards over gloo as over NCCL; accelerate asks for several accelerators.
    """
    state = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def has_bf16_products() -> bool:
    """Whether this CPU has instructions for bfloat16 products; torch tells it in a private op."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def foreach_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the norm of each tensor; the fused form, which torch's own clipping uses."""
    return torch._foreach_norm(list(tensors))


def foreach_multiply(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiplies each tensor in place; the fused form."""
    torch._foreach_mul_(list(tensors), factor)


def onednn_linear() -> Callable[..., Tensor] | None:
    """Returns oneDNN's linear layer, which torch.compile calls: the only way to it in float32."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def saved_tensor_hooks() -> Hooks | None:
    """Returns the innermost hooks on tensors that autograd keeps; there is no public reader."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def version_of(tensor: Tensor) -> int:
    """Returns how often a tensor was changed in place; autograd's own check reads the same."""
    return tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody hooked into the module; torch has no public question for it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether Module.compile was called on the module."""
    return module._compiled_call_impl is not None
