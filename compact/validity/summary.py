"""What the judgements of a data set come to, in sentences: what is known, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

from compact.validity.cases import Case
from compact.validity.judge import Judgement


def describe(cases: Sequence[Case], judgements: Sequence[Sequence[Judgement]]) -> list[str]:
    """Returns sentences about what the weights of the data can rest on, one a line.

    Args:
        cases: the problems.
        judgements: of every rationale of each problem.
    """
    several = [(c, j) for c, j in zip(cases, judgements, strict=True) if len(j) > 1]
    lines = []
    alone = len(cases) - len(several)
    if alone:
        lines.append(f"{_of(alone, len(cases))} problems have one rationale, of weight 1")
    gold = [(c, j) for c, j in several if c.gold is not None]
    if gold:
        right = [sum(r.answer == c.gold for r in c.rationales) for c, _ in gold]
        none = sum(n == 0 for n in right)
        mixed = sum(0 < n < len(c.rationales) for n, (c, _) in zip(right, gold, strict=True))
        lines.append(
            f"{_of(mixed, len(gold))} problems with a gold answer have rationales that state it "
            "and others that do not: these get (almost) no weight"
        )
        if none:
            lines.append(
                f"{_of(none, len(gold))} have no rationale that states the gold answer: they are "
                "skipped, unless the answer of one could not be read. Is the gold answer written "
                "as teachers write it? (`answer_type`, docs/data-format.md)"
            )
    voting = [(c, j) for c, j in several if c.gold is None]
    nothing = sum(j[0].basis == "nothing" for _, j in voting)
    if voting:
        lines.append(
            f"{_of(len(voting) - nothing, len(several))} problems without a gold answer are judged "
            "by a vote of the stated answers"
        )
    if nothing:
        lines.append(
            f"{_of(nothing, len(voting))} of these have no two equal answers: nothing is known of "
            "them and their weights are nearly even; gold answers or more teachers would help"
        )
    rationales = [judgement for _, of_case in several for judgement in of_case]
    for kind, words in (
        ("unread", "state no answer that could be read"),
        ("arithmetic", "hold an equation that is wrong"),
        ("numbers", "hold a number from nowhere"),
    ):
        count = sum(any(f.kind == kind for f in j.findings) for j in rationales)
        if count:
            lines.append(f"{_of(count, len(rationales))} rationales {words}")
    return lines


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"
