"""Measures which of two completions a student finds more likely: the chosen or the rejected one.

A completion's score is the mean log-probability of its tokens, as in SimPO (Meng et al. 2024,
arXiv 2405.14734), so that a longer one is not less likely for its length. A pair counts as right if
the chosen completion has the higher score. Nothing is generated: the student reads
a prompt once with both completions. So a student that answers hardly any question can still show
what it has learned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compact.data import PreferencePair, Problem, Rationale
from compact.evaluation.evaluate import wilson_interval
from compact.evaluation.score import passes_of
from compact.files import ANY_NUMBER
from compact.passes.encode import encode_problems, tell_of_cuts
from compact.passes.forward import observe
from compact.passes.layout import choose_layout
from compact.passes.segments import segment_mean
from compact.resumable import ResumableRows
from compact.student import Student, learned_positions

PAIR = {"chosen": ANY_NUMBER, "rejected": ANY_NUMBER, "correct": bool}
"""A row of the file of scores, besides its question_id."""


def evaluate_pairs(
    model: Any,
    processing_class: Any,
    pairs: Sequence[PreferencePair],
    out: str | Path | None = None,
    *,
    settings: dict[str, Any] | None = None,
    max_length: int = 2560,
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
        max_length: most tokens of the prompt and one completion; what is longer is cut. A student
            with learned positions reads at most as many.
        progress: whether to show a progress bar.
        items: gets question_id -> {chosen, rejected: mean log-probability in nats per token,
            correct} of every pair, as in the rows of `out`.

    Returns:
        items, correct, accuracy, ci_low, ci_high (95%), margin (mean of chosen minus rejected, nats
        per token), seconds.

    Raises:
        ValueError: there is no pair, one cannot be encoded, or `out` belongs to another run.
    """
    if not pairs:
        raise ValueError("evaluate_pairs: pairs must hold at least one pair, got none")
    start = time.monotonic()
    student = Student.of(model, processing_class)
    max_length = min(max_length, learned_positions(student.model) or max_length)
    layout = choose_layout(student, "auto", max_length)[0]
    settings = {"max_length": max_length, **(settings or {})}
    rows = None if out is None else ResumableRows(out, settings, key="question_id", shape=PAIR)
    done: dict[str, dict[str, Any]] = {} if rows is None else rows.done
    todo = encode_problems(
        [_as_problem(pair) for pair in pairs if pair.question_id not in done],
        processing_class,
        max_length=max_length,
        judged=False,
    )
    tell_of_cuts(todo, max_length)
    training = model.training
    model.eval()
    bar = tqdm(total=len(pairs), initial=len(done), unit="pair", disable=not progress)
    try:
        with rows or nullcontext(), bar:
            for chunk in passes_of(todo):
                pass_ = observe(student, chunk, layout=layout, leaves=False)
                score = -segment_mean(pass_.stats.nll.float(), pass_.batch.token_offsets)
                for problem, (chosen, rejected) in zip(
                    chunk, score.view(-1, 2).tolist(), strict=True
                ):
                    row = {"question_id": problem.question_id, "chosen": chosen}
                    row |= {"rejected": rejected, "correct": chosen > rejected}
                    if rows is None:
                        done[problem.question_id] = row
                    else:
                        rows.append(row)
                bar.update(len(chunk))
    finally:
        model.train(training)
    found = [done[pair.question_id] for pair in pairs]
    correct = sum(row["correct"] for row in found)
    low, high = wilson_interval(correct, len(found))
    summary = {
        "items": len(found),
        "correct": correct,
        "accuracy": correct / len(found),
        "ci_low": low,
        "ci_high": high,
        "margin": sum(row["chosen"] - row["rejected"] for row in found) / len(found),
        "seconds": round(time.monotonic() - start, 1),
    }
    if rows is not None:
        rows.complete(summary)
    if items is not None:
        items.update((row["question_id"], row) for row in found)
    return summary


def describe_pairs(name: str, summary: dict[str, Any]) -> str:
    """Returns a summary as one line."""
    return (
        f"{name}: the chosen completion is likelier in {summary['accuracy']:.3f} "
        f"({summary['correct']}/{summary['items']}, 95% CI {summary['ci_low']:.3f}-"
        f"{summary['ci_high']:.3f}), by {summary['margin']:+.4f} nats per token, "
        f"{summary['seconds']:.0f} s"
    )


def _as_problem(pair: PreferencePair) -> Problem:
    """A pair as a problem with two teachers, whose prompt is read once."""
    sides = enumerate(("chosen", "rejected"))
    rationales = tuple(Rationale(side, getattr(pair, side), line) for line, side in sides)
    return Problem(pair.question_id, pair.prompt, None, rationales)
