"""Measures a student's accuracy: greedy answers to questions, judged, with a 95% interval."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compact.answers import Judge
from compact.data import Problem
from compact.passes.encode import encode_prompt
from compact.resumable import rows_at
from compact.student.generation import generate

_SECONDS_BETWEEN_DRAWINGS = 0.5
ITEM = {
    "completion": str,
    "gold": str,
    "predicted": (str, None),
    "correct": bool,
    "note": str,
    "tokens": int,
}


def wilson_interval(correct: int, items: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a proportion; (0, 1) without items."""
    if items == 0:
        return 0.0, 1.0
    p, n, z = correct / items, items, 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns accuracy with its 95% interval, and the counts that it is computed from."""
    items = list(items)
    correct = sum(item["correct"] for item in items)
    low, high = wilson_interval(correct, len(items))
    return {
        "items": len(items),
        "correct": correct,
        "accuracy": correct / len(items) if items else 0.0,
        "ci_low": low,
        "ci_high": high,
        "unparsed": sum(item["predicted"] is None for item in items),
        "unjudged": sum(bool(item["note"]) for item in items),
        "mean_tokens": sum(item["tokens"] for item in items) / max(1, len(items)),
    }


def describe(name: str, summary: dict[str, Any]) -> str:
    """Returns a summary as one line."""
    return (
        f"{name}: accuracy {summary['accuracy']:.3f} ({summary['correct']}/{summary['items']}, "
        f"95% CI {summary['ci_low']:.3f}-{summary['ci_high']:.3f}), "
        f"{summary['unparsed']} without an answer, "
        f"{summary['mean_tokens']:.0f} tokens per answer, {summary['seconds']:.0f} s"
    )


class _Within:
    """Moves the progress bar within a batch, by answers that have ended and tokens."""

    def __init__(self, bar: Any, most: int) -> None:
        self.bar, self.start, self.most = bar, bar.n, most
        self.drawn = time.monotonic()

    def __call__(self, ended: int, tokens: int) -> None:
        self.bar.n = self.start + ended
        if time.monotonic() - self.drawn > _SECONDS_BETWEEN_DRAWINGS:
            self.drawn = time.monotonic()
            self.bar.set_postfix_str(f"token {tokens} of at most {self.most}")


def check_questions(
    problems: Sequence[Problem], processing_class: Any
) -> dict[str, tuple[int, ...]]:
    """Returns question_id -> token ids of the prompt, of questions that can be judged.

    Raises:
        ValueError: no problems, a question_id occurs twice or has no gold answer, or a prompt
            cannot be encoded.
    """
    if not problems:
        raise ValueError("evaluate: problems must hold at least one problem, got none")
    found: dict[str, tuple[int, ...]] = {}
    for problem in problems:
        if problem.question_id in found:
            raise ValueError(f"evaluate: question_id {problem.question_id!r} occurs twice")
        if problem.answer is None:
            raise ValueError(
                f"evaluate: question_id {problem.question_id!r} must have a gold answer, got none"
            )
        found[problem.question_id] = tuple(encode_prompt(problem.prompt, processing_class))
    return found


def evaluate(
    model: Any,
    processing_class: Any,
    problems: Sequence[Problem],
    out: str | Path | None = None,
    *,
    settings: dict[str, Any] | None = None,
    judge: Judge | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    progress: bool = True,
    items: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Answers each problem greedily and judges the answers.

    Args:
        model: a causal LM; it is put in eval mode, and its mode is restored at the end.
        processing_class: its tokenizer.
        problems: the questions; only question_id, prompt and answer are read.
        out: item file (JSON lines, appended after each batch); items already in it are not
            answered again.
        settings: what identifies the run; saved beside `out` and compared when a run resumes.
        judge: judges completions, each in its problem's answer domain; None: a new one.
        max_new_tokens: most tokens of an answer.
        batch_size: answers generated at once; it changes results only by rounding.
        progress: whether to show a progress bar.
        items: gets question_id -> item of every question, as in the rows of `out`.

    Returns:
        items, correct, accuracy, ci_low, ci_high (95%), unparsed, unjudged, mean_tokens, seconds.

    Raises:
        ValueError: as in `check_questions`, or `out` belongs to another run.
    """
    start = time.monotonic()
    prompts = check_questions(problems, processing_class)
    settings = {"max_new_tokens": max_new_tokens, **(settings or {})}
    # Longest first: prompts in a batch have similar length, and if memory is too small, the first
    # batch shows it.
    asked_for = sorted(problems, key=lambda p: -len(prompts[p.question_id]))
    ids = list(prompts)
    golds = {p.question_id: p.answer for p in problems if p.answer is not None}
    own_judge = judge is None
    judge = judge or Judge()
    try:
        with (
            rows_at(out, settings, key="question_id", shape=ITEM) as rows,
            tqdm(
                total=len(ids),
                initial=sum(i in rows.done for i in ids),
                unit="item",
                disable=not progress,
            ) as bar,
        ):
            done = rows.done
            todo = [(prompts[p.question_id], p) for p in asked_for if p.question_id not in done]
            for first in range(0, len(todo), batch_size):
                part = todo[first : first + batch_size]
                watch = _Within(bar, max_new_tokens) if progress else None
                asked = [ids for ids, _ in part]
                answers = generate(model, processing_class, asked, max_new_tokens, watch=watch)
                texts = [processing_class.decode(x, skip_special_tokens=True) for x in answers]
                verdicts = judge.judge(
                    [
                        (p.domain, x, golds[p.question_id])
                        for x, (_, p) in zip(texts, part, strict=True)
                    ]
                )
                for i, (_, problem) in enumerate(part):
                    item = {
                        "question_id": problem.question_id,
                        "completion": texts[i].strip(),
                        "gold": problem.answer,
                        **asdict(verdicts[i]),
                        "tokens": len(answers[i]),
                    }
                    rows.append(item)
                bar.update(first + len(part) + len(problems) - len(todo) - bar.n)
                right = sum(item["correct"] for item in done.values())
                bar.set_postfix_str(f"accuracy {right / len(done):.3f}")
    finally:
        if own_judge:
            judge.close()
    summary = summarise(done[i] for i in ids) | {"seconds": round(time.monotonic() - start, 1)}
    rows.complete(summary)
    if items is not None:
        items.update((i, done[i]) for i in ids)
    return summary
