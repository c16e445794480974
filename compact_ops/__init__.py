"""Fused operators for multi-teacher distillation: statistics and weighted gradients of the LM head."""

from compact_ops._library import backend

__all__ = ["backend"]
