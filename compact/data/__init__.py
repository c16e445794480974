"""Rationales and questions: read and check files, import files of other projects."""

from compact.data.problems import (
    Message,
    Problem,
    Rationale,
    Text,
    load_problems,
    load_questions,
    of_teacher,
    text_of,
)

__all__ = [
    "Message",
    "Problem",
    "Rationale",
    "Text",
    "load_problems",
    "load_questions",
    "of_teacher",
    "text_of",
]
