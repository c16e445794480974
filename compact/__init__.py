"""COMPACT: multi-teacher chain-of-thought distillation for small students.

`CompactTrainer` trains, `CompactConfig` holds its settings; each command of `compact` has a module
of its own name. The guides say how they are used.
"""
