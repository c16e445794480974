"""What is read of a problem: its question, gold answer, and the steps and answers of rationales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol


class Solution(Protocol):
    """A rationale; `compact.passes.EncodedRationale` is one."""

    @property
    def teacher(self) -> str:
        """The name of the teacher."""

    @property
    def text(self) -> str:
        """The completion."""

    @property
    def step_texts(self) -> tuple[str, ...]:
        """The text of each reasoning step."""

    @property
    def answer(self) -> str | None:
        """The stated answer; answers of one problem match if their texts are equal."""


class Case(Protocol):
    """A problem; `compact.passes.EncodedProblem` is one."""

    @property
    def prompt(self) -> str:
        """The question."""

    @property
    def gold(self) -> str | None:
        """The gold answer, None if it is not known."""

    @property
    def kind(self) -> str:
        """The kind of its answers: how often a check fires is learned for each kind."""

    @property
    def rationales(self) -> Sequence[Solution]:
        """The K >= 1 rationales."""


def shares(case: Case) -> list[float]:
    """Returns 1 / (number of rationales with the same text) of each rationale.

    Copies of a text are one piece of evidence, and share one weight.
    """
    copies = Counter(r.text for r in case.rationales)
    return [1.0 / copies[r.text] for r in case.rationales]


def own_votes(case: Case) -> list[float]:
    """Returns the vote of each rationale: 1 if its text is a single statement, else its share.

    Teachers that only state "The answer is 16." write the same text without copying each other.
    """
    single = [r.step_texts == (r.text.strip(),) for r in case.rationales]
    return [1.0 if s else share for s, share in zip(single, shares(case), strict=True)]
