"""Rationales and questions: reading, checking, and turning other tools' files into ours."""

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
