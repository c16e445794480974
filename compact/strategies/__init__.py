"""Seams of the trainer that other distillation methods plug into, and the methods themselves."""

from compact.strategies.base import (
    STRATEGIES,
    LossTerm,
    Strategy,
    make_strategy,
    register_strategy,
)

__all__ = ["STRATEGIES", "LossTerm", "Strategy", "make_strategy", "register_strategy"]
