"""Loads a student and splits it into its body and its LM head."""

from compact.student.adapters import peft_config
from compact.student.loading import (
    ADAPTER_FILE,
    base_name,
    holds_adapter,
    load_model,
    load_student,
    named_students,
    smollm2_path,
)
from compact.student.student import Student, learned_positions

__all__ = [
    "ADAPTER_FILE",
    "Student",
    "base_name",
    "holds_adapter",
    "learned_positions",
    "load_model",
    "load_student",
    "named_students",
    "peft_config",
    "smollm2_path",
]
