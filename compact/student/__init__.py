"""Loads a student and splits it into its body and its LM head."""

from typing import TYPE_CHECKING

from compact.registry import lazy_names
from compact.student.names import ADAPTER_FILE, base_name, holds_adapter, named_students

if TYPE_CHECKING:
    from compact.student.adapters import peft_config
    from compact.student.loading import load_model, load_student, smollm2_path
    from compact.student.student import Student, autocast_dtype, evaluating, learned_positions

# Public names whose modules load torch -> (module, name there).
_LAZY = {
    "Student": ("compact.student.student", "Student"),
    "autocast_dtype": ("compact.student.student", "autocast_dtype"),
    "evaluating": ("compact.student.student", "evaluating"),
    "learned_positions": ("compact.student.student", "learned_positions"),
    "load_model": ("compact.student.loading", "load_model"),
    "load_student": ("compact.student.loading", "load_student"),
    "peft_config": ("compact.student.adapters", "peft_config"),
    "smollm2_path": ("compact.student.loading", "smollm2_path"),
}
__getattr__ = lazy_names(__name__, _LAZY)
__all__ = [
    "ADAPTER_FILE",
    "Student",
    "autocast_dtype",
    "base_name",
    "evaluating",
    "holds_adapter",
    "learned_positions",
    "load_model",
    "load_student",
    "named_students",
    "peft_config",
    "smollm2_path",
]
