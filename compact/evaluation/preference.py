"""Measures which of two completions a student finds more likely: the chosen or the rejected one.

A completion's score is the mean log-probability of its tokens, as in SimPO (Meng et al. 2024,
arXiv 2405.14734), so that a longer one is not less likely for its length. The chosen completion is
preferred if its score is higher. Nothing is generated: the student reads both completions. So a
student that answers hardly any question can still show what it has learned.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compact.data import PreferencePair, Problem, Rationale
from compact.evaluation.evaluate import wilson_interval
from compact.evaluation.score import passes_of
from compact.files import ANY_NUMBER
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problems
from compact.passes.forward import check_ids, observe
from compact.passes.layout import choose_layout
from compact.passes.segments import segment_mean
from compact.resumable import rows_at
from compact.student import Student, evaluating

PAIR = {"chosen": ANY_NUMBER, "rejected": ANY_NUMBER, "correct": bool}
"""A row of the file of scores, besides its question_id."""
_NOTHING_IS_CUT = 1 << 30


def encode_pairs(pairs: Sequence[PreferencePair], processing_class: Any) -> list[EncodedProblem]:
    """Encodes pairs, each as a problem with two teachers; nothing is cut.

    Raises:
        ValueError: there is no pair, a question_id occurs twice, a pair cannot be encoded, or its
            two completions have the same tokens.
    """
    if not pairs:
        raise ValueError("pairs must hold at least one preference pair, got none")
    name, times = Counter(pair.question_id for pair in pairs).most_common(1)[0]
    if times > 1:
        raise ValueError(f"pairs: question_id {name!r} occurs twice")
    problems = [_as_problem(pair) for pair in pairs]
    settings: dict[str, Any] = {"max_length": _NOTHING_IS_CUT, "judged": False}
    encoded = encode_problems(problems, processing_class, **settings)
    for problem in encoded:
        chosen, rejected = (rationale.ids for rationale in problem.rationales)
        if chosen == rejected:
            raise ValueError(
                f"question_id {problem.question_id!r}: chosen and rejected must differ, got the "
                "same tokens"
            )
    return encoded


def evaluate_pairs(
    model: Any,
    processing_class: Any,
    pairs: Sequence[PreferencePair],
    out: str | Path | None = None,
    *,
    settings: dict[str, Any] | None = None,
    progress: bool = True,
    items: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Scores both completions of every pair.

    Args:
        model: a causal LM; it is put in eval mode, and its mode is restored at the end.
        processing_class: its tokenizer.
        pairs: the pairs.
        out: file of scores (JSON lines, appended after each pass); pairs in it are not repeated.
        settings: what identifies the run; saved beside `out` and compared when a run resumes.
        progress: whether to show a progress bar.
        items: gets question_id -> {chosen, rejected: mean log-probability in nats per token,
            correct: whether that of chosen is higher} of every pair, as in the rows of `out`.

    Returns:
        items, correct, preferred (share of the pairs that are correct), ci_low, ci_high (95%),
        margin (mean of chosen minus rejected, nats per token), seconds.

    Raises:
        ValueError: as in `encode_pairs`, the student cannot read a pair, a score is not finite, or
            `out` belongs to another run.
    """
    start = time.monotonic()
    encoded = encode_pairs(pairs, processing_class)
    student = Student.of(model, processing_class)
    check_ids(student, encoded, leaves=False)
    longest = max(len(p.prompt_ids) + len(r.ids) for p in encoded for r in p.rationales)
    layout = choose_layout(student, "auto", longest)[0]
    with (
        evaluating(model),
        rows_at(out, settings or {}, key="question_id", shape=PAIR) as rows,
        tqdm(total=len(pairs), initial=len(rows.done), disable=not progress, unit="pair") as bar,
    ):
        todo = [problem for problem in encoded if problem.question_id not in rows.done]
        for chunk in passes_of(todo):
            pass_ = observe(student, chunk, layout=layout, leaves=False)
            score = -segment_mean(pass_.stats.nll.float(), pass_.batch.token_offsets)
            for problem, of_pair in zip(chunk, score.view(-1, 2).tolist(), strict=True):
                rows.append(_row(problem.question_id, *of_pair))
            bar.update(len(chunk))
    found = [rows.done[pair.question_id] for pair in pairs]
    correct = sum(row["correct"] for row in found)
    low, high = wilson_interval(correct, len(found))
    summary = {
        "items": len(found),
        "correct": correct,
        "preferred": correct / len(found),
        "ci_low": low,
        "ci_high": high,
        "margin": sum(row["chosen"] - row["rejected"] for row in found) / len(found),
        "seconds": round(time.monotonic() - start, 1),
    }
    rows.complete(summary)
    if items is not None:
        items.update((row["question_id"], row) for row in found)
    return summary


def describe_pairs(name: str, summary: dict[str, Any]) -> str:
    """Returns a summary as one line."""
    return (
        f"{name}: the chosen completion is preferred in {summary['preferred']:.3f} "
        f"({summary['correct']}/{summary['items']}, 95% CI {summary['ci_low']:.3f}-"
        f"{summary['ci_high']:.3f}), by {summary['margin']:+.4f} nats per token, "
        f"{summary['seconds']:.0f} s"
    )


def _row(question_id: str, chosen: float, rejected: float) -> dict[str, Any]:
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise ValueError(
            f"question_id {question_id!r}: the mean log-probabilities must be finite, got {chosen} "
            f"(chosen) and {rejected} (rejected)"
        )
    return {
        "question_id": question_id,
        "chosen": chosen,
        "rejected": rejected,
        "correct": chosen > rejected,
    }


def _as_problem(pair: PreferencePair) -> Problem:
    """A pair as a problem with two teachers; in a tree its prompt is read once."""
    sides = enumerate(("chosen", "rejected"))
    rationales = tuple(Rationale(side, getattr(pair, side), line) for line, side in sides)
    return Problem(pair.question_id, pair.prompt, None, rationales)
