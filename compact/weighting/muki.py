"""MUKI: weights from how sure each teacher is of its answer.

    c_k = 1 - H(answers of teacher k) / log n,   alpha = softmax_k(c_k / tau),   tau = .2

H is the entropy of the n answers that the teacher gave when it was asked the question n times
(self-consistency). Answers are compared in the problem's answer domain. With `margin`, a question
counts as much as its two best teachers differ, c_(1) - c_(2), divided by the running mean of this
margin; the weights of a problem then sum to that factor instead of to 1.

Source: MUKI (arXiv 2210.05230), which merges classifiers by the entropy of their softmax and weighs
an instance by the margin. Ours: text teachers, so answers are sampled or their probability is
given; the margin is off by default.

The confidences are read from a file of JSON lines with question_id, teacher and either `confidence`
(0 to 1, such as the probability of the answer's tokens) or `answers` (a list of sampled answers).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact.answers import Domain, unified
from compact.files import json_lines
from compact.options import check_number
from compact.passes import Pass
from compact.passes.segments import segment_softmax
from compact.passes.transfer import put
from compact.weighting.policies import StatefulPolicy, register_policy


def confidence(answers: Sequence[str], domain: Domain) -> float:
    """Returns 1 - entropy / log n of n >= 2 sampled answers; those that match are the same one."""
    normal = [domain.normalise(answer) for answer in answers]
    n, counts = len(answers), Counter(unified(normal, domain, None)).values()
    return 1.0 + sum(c / n * math.log(c / n) for c in counts) / math.log(n)


def read_confidences(path: str | Path) -> dict[tuple[str, str], float | list[str]]:
    """Returns (question_id, teacher) -> confidence in 0..1, or two or more sampled answers.

    Raises:
        ValueError: a line cannot be used; the message names file and line.
        OSError: the file cannot be read.
    """
    found: dict[tuple[str, str], float | list[str]] = {}
    for where, _, row in json_lines(path):
        try:
            key = (str(row["question_id"]), str(row["teacher"]))
        except (KeyError, TypeError):
            raise ValueError(
                f"{where}: expected a JSON object with question_id and teacher, got "
                f"{str(row)[:60]!r}"
            ) from None
        if key in found:
            raise ValueError(f"{where}: teacher {key[1]!r} has two lines for question {key[0]!r}")
        found[key] = _confidence_of(row, where)
    return found


def _confidence_of(row: Mapping[str, Any], where: str) -> float | list[str]:
    value, answers = row.get("confidence"), row.get("answers")
    if isinstance(answers, list) and len(answers) >= 2:
        return [str(answer) for answer in answers]
    if isinstance(value, int | float) and 0.0 <= value <= 1.0:
        return float(value)
    raise ValueError(
        f"{where}: expected answers (a list of two or more) or confidence (0 to 1), got "
        f"{answers if answers is not None else value!r}"
    )


class _Muki(StatefulPolicy):
    """The policy `muki`; its state is the running mean of the margins."""

    def __init__(self, confidences: str, tau: float, margin: bool) -> None:
        check_number("tau", tau, above=0)
        if not isinstance(margin, bool):
            raise ValueError(f"margin must be true or false, got {margin!r}")
        self.table = read_confidences(confidences)
        self.tau, self.margin = tau, margin
        self.sum, self.count = 0.0, 0

    def scores(self, pass_: Pass) -> dict[str, Tensor]:
        values = []
        for problem in pass_.batch.problems:
            for rationale in problem.rationales:
                key = (problem.question_id, rationale.teacher)
                if key not in self.table:
                    raise ValueError(
                        f"override of muki: confidences must have question_id {key[0]!r}, teacher "
                        f"{key[1]!r}, found no line"
                    )
                found = self.table[key]
                if isinstance(found, list):  # only now the domain is known
                    found = self.table[key] = confidence(found, problem.domain)
                values.append(found)
        return {"confidence": put(values, pass_.batch.problem)}

    def weigh(self, scores: Mapping[str, Tensor], pass_: Pass) -> Tensor:
        confidence, counts = scores["confidence"], pass_.batch.counts
        alpha = segment_softmax(confidence / self.tau, counts)
        if not self.margin:
            return alpha
        mean = self.sum / self.count if self.sum > 0 else 1.0
        margins = torch.stack([margin_of(part) for part in confidence.split(counts)]) / mean
        return alpha * margins[pass_.batch.problem]

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        margins = [float(margin_of(p)) for p in scores["confidence"].split(offsets.diff().tolist())]
        self.sum, self.count = self.sum + sum(margins), self.count + len(margins)

    def take_log(self) -> dict[str, float]:
        return {"margin": self.sum / self.count} if self.count else {}

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sum, self.count = float(state["sum"]), int(state["count"])


def margin_of(confidences: Tensor) -> Tensor:
    """Returns the difference of the two largest; with one teacher its confidence."""
    best = confidences.topk(min(2, len(confidences))).values
    return best[0] - best[1] if len(best) > 1 else best[0]


@register_policy("muki")
def muki(confidences: str, tau: float = 0.2, margin: bool = False) -> StatefulPolicy:
    """Weights softmax_k(c_k / tau), c_k = 1 - entropy / log n of a teacher's sampled answers."""
    return _Muki(confidences, tau, margin)
