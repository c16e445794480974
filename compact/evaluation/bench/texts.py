"""The bench without a student: what texts alone say about right and wrong, in seconds.

Rows are those of `compact.evaluation.bench.collect`, with the scores that need no student: `judged`
and `agreement` of `compact.validity`, the vote of the stated answers, length and steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from compact.answers import unified
from compact.data import Problem, text_of
from compact.data.labelled import Label, Labels
from compact.text.equations import equations
from compact.text.steps import split_steps
from compact.validity import judge


@dataclass(frozen=True)
class _Solution:
    teacher: str
    text: str
    step_texts: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class _Case:
    prompt: str
    gold: str | None
    kind: str
    rationales: tuple[_Solution, ...]


def judge_texts(problems: Sequence[Problem], labels: Labels, name: str) -> list[dict[str, Any]]:
    """Returns a row per problem, in order.

    Args:
        problems: labelled problems.
        labels: their labels.
        name: label of the progress bar.
    """
    cases = [_case(problem) for problem in tqdm(problems, desc=name, unit="q")]
    seen = judge(cases)
    blind = judge([replace(case, gold=None) for case in cases])
    rows = []
    for problem, case, with_gold, without in zip(problems, cases, seen, blind, strict=True):
        count, votes = len(case.rationales), _votes(case)
        each = zip(case.rationales, votes, with_gold, without, strict=True)
        rationales = []
        for r, mine, judged, unseen in each:
            label = labels[problem.question_id, r.teacher]
            rationales.append(
                {
                    "teacher": r.teacher,
                    "right": label.right,
                    "states_gold": label.states_gold,
                    "tokens": len(r.text.split()),
                    "scores": {
                        "judged": judged.validity,
                        "judged without gold": unseen.validity,
                        "agreement": judged.agreement,
                        "agreement without gold": unseen.agreement,
                        "answer": mine / count,
                        "length": float(len(r.text)),
                        "steps": float(len(r.step_texts)),
                    },
                    "axes": {},
                    "weights": {
                        "rejection": float(label.states_gold or False),
                        "answer-vote": float(mine == max(votes)),
                    },
                    "steps": _steps(label),
                }
            )
        rows.append({"question_id": problem.question_id, "rationales": rationales})
    return rows


def _votes(case: _Case) -> list[int]:
    """Returns [K] how many rationales state the answer of each, as the metric `answer` counts."""
    counts = Counter(r.answer for r in case.rationales)
    return [1 if r.answer is None else counts[r.answer] for r in case.rationales]


def _case(problem: Problem) -> _Case:
    texts = [text_of(r.completion) for r in problem.rationales]
    domain = problem.domain
    gold = None if problem.answer is None else domain.normalise(problem.answer)
    answers = unified([domain.extract(text) for text in texts], domain, gold)
    return _Case(
        text_of(problem.prompt),
        gold,
        domain.name,
        tuple(
            _Solution(r.teacher, text, tuple(step.text for step in split_steps(text)), answer)
            for r, text, answer in zip(problem.rationales, texts, answers, strict=True)
        ),
    )


def _steps(label: Label) -> list[dict[str, Any]]:
    """Returns the scores of the labelled steps that need no student."""
    return [
        {
            "right": right,
            "equations": float(sum(not e.holds for e in equations(text))),
            "length": float(len(text)),
        }
        for text, right in label.steps
    ]
