"""Strategies: other distillation methods, as hooks that the trainer calls; one file each.

A strategy knows no other strategy, and the trainer knows only the hooks of `base.Strategy`.
"""

import importlib

from compact.strategies.base import (
    STRATEGIES,
    LossTerm,
    Strategy,
    Term,
    make_strategy,
    register_strategy,
)

# Each file states formula, source and what is ours.
_BUILT_IN = (
    "adaswitch",
    "answer_confidence",
    "aqg",
    "co_supervised",
    "crsd",
    "feature_contrast",
    "fragment_ema",
    "mot",
    "orion",
    "p_align",
    "trico",
)
for _name in _BUILT_IN:
    importlib.import_module(f"compact.strategies.{_name}")

__all__ = ["STRATEGIES", "LossTerm", "Strategy", "Term", "make_strategy", "register_strategy"]
