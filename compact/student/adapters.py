"""LoRA settings of a recipe as peft takes them."""

from __future__ import annotations

import logging
from typing import Any

from compact.config import RecipeConfig
from compact.student.loading import holds_adapter

logger = logging.getLogger(__name__)


def peft_config(recipe: RecipeConfig) -> Any:
    """Returns the LoraConfig of a recipe.

    Returns:
        None where every weight is trained, and where the model is an adapter, which is then
        trained on.

    Raises:
        ValueError: every weight is to be trained of a model that is an adapter.
    """
    if recipe.model is not None and holds_adapter(recipe.model):
        if not recipe.use_peft:
            raise ValueError(
                f"use_peft must be true with {recipe.model}, which holds an adapter: merge it "
                "into its student first to train every weight"
            )
        logger.warning("%s: continues its adapter; lora_* are ignored", recipe.model)
        return None
    if not recipe.use_peft:
        return None
    from peft import LoraConfig

    # peft knows the word all-linear only by itself, and a recipe gives a list.
    all_linear = recipe.lora_target_modules == ["all-linear"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if all_linear else recipe.lora_target_modules,
    )
