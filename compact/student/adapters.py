"""Turns the LoRA keys of a recipe into a config of peft."""

from __future__ import annotations

import logging
from typing import Any

from compact.settings import RecipeConfig
from compact.student.names import holds_adapter

logger = logging.getLogger(__name__)


def peft_config(recipe: RecipeConfig) -> Any:
    """Returns the adapters that a recipe asks for.

    Returns:
        A LoraConfig. None when every weight is trained, and when the model is an adapter, whose
        training then continues.

    Raises:
        ValueError: use_peft is false but the model is an adapter.
    """
    if recipe.model is not None and holds_adapter(recipe.model):
        if not recipe.use_peft:
            raise ValueError(
                f"use_peft must be true with {recipe.model}, which holds an adapter, got false; "
                "to train every weight, merge the adapter into its base model first"
            )
        logger.warning("%s: continues its adapter; lora_* are ignored", recipe.model)
        return None
    if not recipe.use_peft:
        return None
    from peft import LoraConfig

    # A recipe gives a list, but peft accepts all-linear only as a string.
    all_linear = recipe.lora_target_modules == ["all-linear"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if all_linear else recipe.lora_target_modules,
    )
