"""Students whose parameters are shared out over the processes: FSDP2 and DeepSpeed's ZeRO-3.

Both gather the parameters of a module when it is called. The operators read the weight of the LM
head without calling the head, so here it is gathered from the first micro-batch of a step until its
last.
"""

from __future__ import annotations

import math
import os
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule


def asked_for(args: Any) -> str | None:
    """Returns "DEEPSPEED" or "FSDP" if the settings or accelerate ask for it, else None."""
    if args.deepspeed_plugin is not None:  # for the setting `deepspeed` and for accelerate
        return "DEEPSPEED"
    by_accelerate = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return "FSDP" if args.fsdp or by_accelerate else None


def check_sharding(trainer: Any) -> None:
    """Checks the settings of FSDP, DeepSpeed and other parallelism before the first step.

    Raises:
        ValueError: FSDP is of version 1 or checkpoints activations itself, FSDP or ZeRO-3 is set up
            so that it cannot save the student, or ranks are to share a batch.
    """
    accelerator = trainer.accelerator
    split = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if getattr(split, f"{name}_size", 1) > 1:
            raise ValueError(
                f"parallelism_config must leave {name}_size at 1, because each rank reads problems "
                f"of its own, got {getattr(split, f'{name}_size')}"
            )
    if trainer.is_fsdp_enabled and not accelerator.is_fsdp2:
        raise ValueError("fsdp_version must be 2, got 1: the wrapper of FSDP1 hides the LM head")
    if trainer.is_fsdp_enabled and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing must be false, because the second run of a layer would "
            "not see the tree; set gradient_checkpointing: true in its place"
        )
    if trainer.is_fsdp_enabled:
        kind = accelerator.state.fsdp_plugin.state_dict_type
        if "FULL_STATE_DICT" not in str(kind):
            raise ValueError(
                "fsdp_state_dict_type must be FULL_STATE_DICT, so that the student can be saved, "
                f"got {kind}"
            )
    if not uses_deepspeed(accelerator):
        return
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"]
    if plugin.zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "zero3_save_16bit_model (stage3_gather_16bit_weights_on_model_save in a file of "
            "DeepSpeed) must be true with ZeRO-3, so that the student can be saved, got false"
        )


def uses_deepspeed(accelerator: Any) -> bool:
    """Whether DeepSpeed trains the student."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def check_whole(model: nn.Module) -> None:
    """Raises ValueError if ZeRO-3 already shares out the parameters of a student."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model must hold whole parameters, but ZeRO-3 shares them out; give its name, or load "
            "it before CompactConfig is made"
        )


def gather_head(head: nn.Module, *, until: bool) -> None:
    """Gathers the parameters of the LM head, if they are sharded, in every process.

    Called before the forward: ZeRO-3 starts to gather what it expects next when that begins, and
    what is on its way has no values yet.

    Args:
        head: the LM head. With FSDP2 its unit is gathered when its last norm is called.
        until: whether this is the last micro-batch of a step, after which they may be given up.
            ZeRO-3 gives up all parameters when it takes a step.
    """
    if isinstance(head, FSDPModule):
        head.set_reshard_after_backward(until, recurse=False)
    sharded = _of_zero3(head)
    missing = [p for p in sharded if p.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(missing)
    for parameter in sharded:
        # The modules that are using it, by id. This one is done with it when the step is taken.
        parameter.ds_active_sub_modules.add(head.ds_id)


def give_up_head(head: nn.Module) -> None:
    """Lets ZeRO-3 give up the head after an evaluation, which takes no step."""
    for parameter in _of_zero3(head):
        parameter.ds_active_sub_modules.discard(head.ds_id)


def bad_norm(accelerator: Any) -> str | None:
    """Returns a message if DeepSpeed met gradients that are not finite.

    DeepSpeed takes the gradients away in the backward, so only their norm can be asked for. With
    fp16 such a norm is part of finding the loss scale.
    """
    if not uses_deepspeed(accelerator) or accelerator.mixed_precision == "fp16":
        return None
    norm = accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
    return None if norm is None or math.isfinite(norm) else f"the norm of the gradients is {norm}"


def _of_zero3(head: nn.Module) -> list[Any]:
    return [p for p in head.parameters() if hasattr(p, "ds_id")]
