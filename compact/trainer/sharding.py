"""Students whose parameters are shared out over the processes: FSDP2 and DeepSpeed's ZeRO-3.

Both gather the parameters of a module when it is called. The operators read the weight of the LM
head without calling the head, so here it is gathered from the first micro-batch of a step until its
last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from compact.student.internals import current_deepspeed_config


def check_sharding(trainer: Any) -> None:
    """Checks the settings of FSDP or DeepSpeed before the first step.

    Raises:
        ValueError: the parameters are sharded by the first version of FSDP, or by ZeRO-3 so that
            the student cannot be saved.
    """
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version must be 2, got 1: the wrapper of FSDP1 hides the LM head")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"]
    if plugin.zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "zero3_save_16bit_model must be true with zero_stage 3, so that the student can be "
            "saved, got false"
        )


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within the context, `from_pretrained` loads every weight in each process.

    Under ZeRO-3 transformers would share the weights out while it reads them. A student is small
    enough to be loaded whole, and is checked and given adapters before it is shared out.
    """
    own = current_deepspeed_config()
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if own is not None:
            set_hf_deepspeed_config(own)  # type: ignore[no-untyped-call]


def check_whole(model: nn.Module) -> None:
    """Raises ValueError if ZeRO-3 already shares out the parameters of a student."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model must hold whole parameters, but ZeRO-3 shares them out; give its name, or load "
            "it before CompactConfig is made"
        )


def gather_head(head: nn.Module, *, until: bool) -> None:
    """Gathers the parameters of the LM head, if they are sharded, in every process.

    Args:
        head: the LM head. With FSDP2 its unit is gathered when its last norm is called.
        until: whether this is the last micro-batch of a step, after which they may be given up.
            ZeRO-3 gives up all parameters when it takes a step.
    """
    if isinstance(head, FSDPModule):
        head.set_reshard_after_backward(until, recurse=False)
    sharded: list[Any] = [p for p in head.parameters() if hasattr(p, "ds_id")]
    missing = [p for p in sharded if p.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(missing)
    for parameter in sharded:
        # The modules that are using it, by id. This one is never done with it.
        parameter.ds_active_sub_modules.add(head.ds_id)
