"""COMPACT: multi-teacher chain-of-thought distillation for small students.

`CompactTrainer` trains and `CompactConfig` has its settings. The names below are imported when they
are first used, so that a process that only checks answers does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compact.registry import lazy_names

if TYPE_CHECKING:
    from compact.answers import register_domain as register_domain
    from compact.config import CompactConfig as CompactConfig
    from compact.data import load_problems as load_problems
    from compact.data import load_questions as load_questions
    from compact.metrics import register as register_metric  # noqa: F401
    from compact.passes import Needs as Needs
    from compact.passes import Pass as Pass
    from compact.strategies import Strategy as Strategy
    from compact.strategies import register_strategy as register_strategy
    from compact.student import Student as Student
    from compact.student import load_student as load_student
    from compact.trainer import CompactTrainer as CompactTrainer
    from compact.trainer import read_scores as read_scores
    from compact.weighting import Preset as Preset
    from compact.weighting import make_weigher as make_weigher
    from compact.weighting import register_policy as register_policy
    from compact.weighting import register_preset as register_preset
    from compact.weighting import register_token_weights as register_token_weights

__version__ = "0.1.0"

# Public name -> (module, its name there).
_PUBLIC = {
    "CompactConfig": ("compact.config", "CompactConfig"),
    "CompactTrainer": ("compact.trainer", "CompactTrainer"),
    "Needs": ("compact.passes", "Needs"),
    "Pass": ("compact.passes", "Pass"),
    "Preset": ("compact.weighting", "Preset"),
    "Strategy": ("compact.strategies", "Strategy"),
    "Student": ("compact.student", "Student"),
    "load_problems": ("compact.data", "load_problems"),
    "load_questions": ("compact.data", "load_questions"),
    "load_student": ("compact.student", "load_student"),
    "make_weigher": ("compact.weighting", "make_weigher"),
    "read_scores": ("compact.trainer", "read_scores"),
    "register_domain": ("compact.answers", "register_domain"),
    "register_metric": ("compact.metrics", "register"),
    "register_policy": ("compact.weighting", "register_policy"),
    "register_preset": ("compact.weighting", "register_preset"),
    "register_strategy": ("compact.strategies", "register_strategy"),
    "register_token_weights": ("compact.weighting", "register_token_weights"),
}
__all__ = sorted(_PUBLIC)
__getattr__ = lazy_names(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
