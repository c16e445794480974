"""Strategies: other distillation methods, as hooks that the trainer calls."""

from compact.strategies.base import (
    STRATEGIES,
    LossTerm,
    Strategy,
    make_strategy,
    register_strategy,
)

__all__ = ["STRATEGIES", "LossTerm", "Strategy", "make_strategy", "register_strategy"]
