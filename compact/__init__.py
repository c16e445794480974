"""COMPACT: multi-teacher chain-of-thought distillation for small students."""
