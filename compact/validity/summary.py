"""What the judgements of a data set come to, in sentences: what is known, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from compact.validity.judge import LEAST, Finding


class Judged(Protocol):
    """What is described of a rationale; `Judgement` is one."""

    @property
    def basis(self) -> str:
        """What its answer was judged by."""

    @property
    def findings(self) -> Sequence[Finding]:
        """What speaks against it."""

    @property
    def validity(self) -> float | None:
        """Its validity; None if the weights do not rest on it."""


def describe(problems: Sequence[Sequence[Judged]], *, weighed: bool) -> list[str]:
    """Returns sentences about what the weights of the data can rest on, one a line.

    Args:
        problems: the rationales of each problem.
        weighed: whether what is judged wrong has no weight.
    """
    several = [judgements for judgements in problems if len(judgements) > 1]
    lines = []
    alone = len(problems) - len(several)
    if alone:
        weight = "1 or 0" if weighed else "1"
        lines.append(f"{_of(alone, len(problems))} problems have one rationale, of weight {weight}")
    gold = [judgements for judgements in several if judgements[0].basis == "gold"]
    if gold:
        right = [[not _kinds(j) & {"answer", "unread"} for j in judgements] for judgements in gold]
        mixed = sum(any(r) and not all(r) for r in right)
        none = sum(not any(r) for r in right)
        then = ": these get no weight, or little if no answer could be read" if weighed else ""
        lines.append(
            f"{_of(mixed, len(gold))} problems with a gold answer have rationales that state it "
            f"and others that do not{then}"
        )
        if none:
            then = ": they are skipped, unless no answer at all could be read" if weighed else ""
            lines.append(
                f"{_of(none, len(gold))} have no rationale that states the gold answer{then}. Is "
                "the gold answer written as teachers write it? (answer_type in docs/data-format.md)"
            )
    validity = [sum(j.validity or 0.0 for j in judgements) for judgements in problems]
    unsound = sum(0.0 < total < LEAST for total in validity)
    if unsound and weighed:
        lines.append(
            f"{_of(unsound, len(problems))} problems are skipped, because every rationale with the "
            "likeliest answer holds an equation that is wrong"
        )
    voting = [judgements for judgements in several if judgements[0].basis != "gold"]
    nothing = sum(judgements[0].basis == "nothing" for judgements in voting)
    if voting and weighed:
        lines.append(
            f"{_of(len(voting) - nothing, len(several))} problems without a gold answer are judged "
            "by a vote of the stated answers"
        )
    if nothing and weighed:
        lines.append(
            f"{_of(nothing, len(voting))} of these have no two equal answers: nothing is known of "
            "them and their weights are nearly even; gold answers or more teachers would help"
        )
    rationales = [judgement for of_problem in several for judgement in of_problem]
    for kind, words in (
        ("unread", "state no answer that could be read"),
        ("arithmetic", "hold an equation that is wrong"),
        ("numbers", "hold a number from nowhere"),
    ):
        count = sum(kind in _kinds(j) for j in rationales)
        if count:
            lines.append(f"{_of(count, len(rationales))} rationales {words}")
    return lines


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"


def _kinds(judged: Judged) -> set[str]:
    return {finding.kind for finding in judged.findings}
