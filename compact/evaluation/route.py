"""Routing of `compact collect --route`: learns from the first questions whom to ask the others.

The student scores the rationales of the first N questions; a preset or policy turns the scores into
weights; a router learns them from the words of the questions. A question that a teacher has
answered stays with this teacher, so a run that is started again asks nobody else.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compact.data import Problem, load_problems, text_of
from compact.evaluation.score import score_problems
from compact.files import content_of_student
from compact.resumable import read_summary, remove_rows, summary_path
from compact.student import Student, load_model
from compact.teachers.collect import Plans, Result
from compact.teachers.export import Found, find_rows, rows_of
from compact.teachers.ledger import estimate
from compact.teachers.router import Router, fit_router
from compact.teachers.store import Store
from compact.weighting import check_gold, make_weigher

logger = logging.getLogger(__name__)


Ask = Callable[[Plans], dict[str, Result]]


class Route:
    """Everybody is asked the first N questions, one teacher each of the others.

    Attributes:
        first_plans: the requests of the first questions.
        others: the other questions.
    """

    def __init__(
        self,
        plans: Plans,
        problems: Sequence[Problem],
        first: int,
        student: str,
        *,
        preset: str,
        scores: Path,
    ) -> None:
        """Checks the settings; nothing is asked.

        Args:
            plans: every teacher with its requests for all questions.
            problems: the questions.
            first: N.
            student: folder, hub name or .gguf file of the student, who scores.
            preset: preset or policy that turns its scores into weights.
            scores: file of scores, kept for the next run.

        Raises:
            ValueError: N is not below the number of questions, there is one teacher only, or the
                preset is unknown or needs gold answers.
        """
        if not 2 <= first < len(problems):
            raise ValueError(
                f"--route must be at least 2 and less than the {len(problems)} questions, "
                f"got {first}"
            )
        if len(plans) < 2:
            raise ValueError(f"--route needs at least 2 teachers, got {len(plans)}")
        self.plans, self.others = plans, problems[first:]
        self._first = {p.question_id for p in problems[:first]}
        self.first_plans = part_of(plans, self._first)
        self._weigher = make_weigher(preset)
        check_gold(self._weigher, problems[:first])
        self._student, self._scores = student, scores
        self._settings = {"weights": content_of_student(student), "preset": preset}

    def run(self, store: Store, ask: Ask | None) -> tuple[Plans, dict[str, Result], dict[str, Any]]:
        """Asks the first questions, learns, and asks the others.

        Args:
            store: where the answers are.
            ask: asks what has no answer yet. None: nothing is asked.

        Returns:
            The requests that remained; name of the teacher -> how it went; and what was learned,
            for the summary (empty if nothing was).

        Raises:
            ValueError: the rationales of the first questions cannot be scored.
            OSError: there is no such student.
        """
        if ask is None:
            return routed(self.plans, self._first, {}, store.keys()), {}, {}
        model, processing_class = load_model(self._student)  # an error comes before any request
        results = ask(self.first_plans)
        names = [name for name, result in results.items() if result.reason is None]
        if len(names) < 2:
            logger.warning("--route needs 2 teachers that can be asked, got %d", len(names))
            return routed(self.plans, self._first, {}, store.keys()), results, {}
        student = Student.of(model, processing_class)
        router = self._learn(find_rows(store, self.first_plans), names, student)
        texts = [text_of(p.prompt) for p in self.others]
        chosen = {
            p.question_id: names[k] for p, k in zip(self.others, router.choose(texts), strict=True)
        }
        left = routed(self.plans, self._first, chosen, store.keys())
        others = part_of(left, {p.question_id for p in self.others})
        results |= ask([(t, items) for t, items in others if t.name in names])
        learned = {
            "questions": len(self._first),
            "reads_words": router.reads_words,
            "single": names[int(router.mean.argmax())],
            "weight_of_asked": router.expected,
            "weight_of_single": router.single,
            "weight_at_random": router.at_random,
            "others": {t.name: len({i.problem.question_id for i in items}) for t, items in others},
            "saved": savings(store, self.plans, left),
        }
        return left, results, learned

    def _learn(self, found: Sequence[Found], names: Sequence[str], student: Student) -> Router:
        """Scores the rationales and fits the router.

        A teacher's weight for a question is the sum over its samples; it is 0 without a usable
        rationale, and for a teacher that cannot be asked.
        """
        rows = rows_of(found)
        owner = {row["teacher"]: one.teacher.name for one in found for row in one.rows}
        if len({row["question_id"] for row in rows}) < 2:
            raise ValueError("--route needs rationales of at least 2 of the first questions")
        problems = load_problems(rows)
        text = repr([(row["question_id"], row["teacher"], row["completion"]) for row in rows])
        about = self._settings | {"rationales": hashlib.sha256(text.encode()).hexdigest()}
        scores = self._scores
        if summary_path(scores).exists() and read_summary(scores)["settings"] != about:
            remove_rows(scores)
        scored = score_problems(
            student,
            student.tokenizer,
            problems,
            self._weigher,
            partial=scores,
            settings=about,
        )
        place = {p.question_id: i for i, p in enumerate(problems)}
        column = {name: k for k, name in enumerate(names)}
        weights = np.zeros((len(problems), len(names)))
        for row in scored:
            k = column.get(owner[row["teacher"]])
            if k is not None:
                weights[place[row["question_id"]], k] += row["weight"]
        return fit_router([text_of(p.prompt) for p in problems], weights)


def part_of(plans: Plans, questions: Collection[str]) -> Plans:
    """Returns the requests of some questions, by their ids."""
    return [(t, [i for i in items if i.problem.question_id in questions]) for t, items in plans]


def routed(
    plans: Plans, first: Collection[str], chosen: Mapping[str, str], known: Collection[str]
) -> Plans:
    """Returns the requests that remain of the plans.

    Args:
        plans: every teacher with all its requests.
        first: ids of the questions that all teachers are asked.
        chosen: question_id -> teacher, for other questions. One without is asked of nobody.
        known: keys of the requests that have an answer. Who has answered a question keeps it.
    """
    owners: dict[str, set[str]] = {}
    for teacher, items in plans:
        for item in items:
            if item.key in known:
                owners.setdefault(item.problem.question_id, set()).add(teacher.name)

    def asked(teacher: str, question: str) -> bool:
        if question in first:
            return True
        return teacher in owners.get(question, {chosen.get(question)})

    return [(t, [i for i in items if asked(t.name, i.problem.question_id)]) for t, items in plans]


def savings(store: Store, plans: Plans, left: Plans) -> dict[str, float]:
    """Estimates what asking every teacher everything would have taken beyond what was asked.

    Args:
        store: the answers, which show what a request of a teacher takes.
        plans: every teacher with all its requests.
        left: the requests that remained.

    Returns:
        requests not sent, all requests, and tokens and cost of the former.
    """
    known, asked = store.keys(), {item.key for _, items in left for item in items}
    # Requests that are missing are not saved.
    every = [(t, [i for i in items if i.key in known or i.key not in asked]) for t, items in plans]
    found = estimate(store, every)
    return {
        "requests": sum(one["left"] or 0 for one in found.values()),
        "of": sum(len(items) for _, items in plans),
        "tokens": sum(one["tokens"] or 0 for one in found.values()),
        "cost": sum(one["cost"] or 0 for one in found.values()),
    }


def describe_routes(learned: Mapping[str, Any]) -> str:
    """Returns what `Route.run` learned and saved, as lines of text."""
    how = "the words of a question choose its teacher"
    if not learned["reads_words"]:
        how = f"the words of a question do not tell, so {learned['single']} is asked"
    told = ", ".join(f"{name} {count}" for name, count in learned["others"].items() if count)
    saved = learned["saved"]
    return (
        f"routing, learned from {learned['questions']} questions: {how}\n"
        f"  mean weight of the teacher asked (leave-one-out): {learned['weight_of_asked']:.3f}; "
        f"of the best single teacher {learned['weight_of_single']:.3f}, "
        f"at random {learned['weight_at_random']:.3f}\n"
        f"  other questions: {told}\n"
        f"  saved {saved['requests']:,.0f} of {saved['of']:,.0f} requests, about "
        f"{saved['tokens']:,.0f} tokens, cost {saved['cost']:.4g}"
    )
