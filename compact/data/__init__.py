"""Rationales and questions: read and check files, import files of other projects."""

from compact.data.problems import (
    Message,
    PreferencePair,
    Problem,
    Rationale,
    Text,
    load_problems,
    load_questions,
    load_test,
    of_teacher,
    text_of,
    warn_of_overlap,
)

__all__ = [
    "Message",
    "PreferencePair",
    "Problem",
    "Rationale",
    "Text",
    "load_problems",
    "load_questions",
    "load_test",
    "of_teacher",
    "text_of",
    "warn_of_overlap",
]
