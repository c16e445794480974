"""Measures the accuracy of a student that a server answers for, many requests at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compact.answers import Judge
from compact.data import Problem
from compact.evaluation.evaluate import summarise
from compact.resumable import ResumableRows, summary_path
from compact.teachers.collect import ask_all
from compact.teachers.prompts import QUESTION
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, Store

logger = logging.getLogger(__name__)


def evaluate_served(
    base_url: str,
    model: str,
    problems: Sequence[Problem],
    out: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    api_key_env: str | None = None,
    max_new_tokens: int = 256,
    concurrency: int = 32,
) -> dict[str, Any]:
    """Answers each problem at temperature 0 through an endpoint, and judges the answers.

    The prompt is sent as a chat, so the server applies the student's chat template.

    Args:
        base_url: the OpenAI-compatible endpoint.
        model: the name that it knows the student by.
        problems: the questions.
        out: item file, as of `evaluate`. Until all questions are answered, the answers are kept in
            a store beside it (`.sqlite`), and the next call asks only for those that are missing.
        settings: what else identifies the run; saved beside `out`.
        api_key_env: environment variable with the endpoint's key.
        max_new_tokens: most tokens of an answer.
        concurrency: most requests at the same time.

    Returns:
        The summary, as of `evaluate`.

    Raises:
        ValueError: a question has no answer and was not refused (a refused question counts as
            wrong); or `out` belongs to another run.
        ImportError, OSError: as in `ask_all`.
    """
    start, out = time.monotonic(), Path(out)
    unknown = next((p.question_id for p in problems if not p.answer), None)
    if unknown is not None:
        raise ValueError(f"question_id {unknown!r} must have a gold answer, got none")
    student = _asked(
        base_url,
        model=model,
        api_key_env=api_key_env,
        temperature=0.0,
        max_tokens=max_new_tokens,
        template=QUESTION,
        concurrency=concurrency,
    )
    about = {"endpoint": base_url, "model": model, "max_new_tokens": max_new_tokens}
    store_file = out.with_suffix(".sqlite")
    if store_file.exists() and not summary_path(out).exists():  # it would be deleted at the end
        raise FileExistsError(
            f"{store_file}: exists, and is of no evaluation with this --out; choose another --out"
        )
    with (
        ResumableRows(out, about | (settings or {}), key="question_id") as rows,
        closing(Store(store_file)) as store,
        closing(Judge()) as judge,
    ):
        todo = [p for p in problems if p.question_id not in rows.done]
        with tqdm(total=len(todo), unit="item") as bar:
            found = ask_all(
                *(store, student, todo),
                called=f"--endpoint {base_url}",
                answered=lambda *_: bar.update(),
            )
        refused = sum(answer is None for _, answer in found)
        if refused:
            logger.warning("%d questions were refused and count as wrong", refused)
        answers = [answer or Answer("") for _, answer in found]
        texts = [answer.text.strip() for answer in answers]
        verdicts = judge.judge(
            [(p.domain, text, p.answer or "") for p, text in zip(todo, texts, strict=True)]
        )
        for problem, answer, text, verdict in zip(todo, answers, texts, verdicts, strict=True):
            rows.append(
                {
                    "question_id": problem.question_id,
                    "completion": text,
                    "gold": problem.answer,
                    **asdict(verdict),
                    "tokens": answer.completion_tokens,
                }
            )
    summary = summarise(rows.done[p.question_id] for p in problems)
    summary["seconds"] = round(time.monotonic() - start, 1)
    rows.complete(summary)
    for end in ("", "-wal", "-shm"):
        store.path.with_name(store.path.name + end).unlink(missing_ok=True)
    return summary


def _asked(base_url: str, **settings: Any) -> Teacher:
    """Returns the student as one who is asked; errors name the option."""
    try:
        return Teacher("student", base_url=base_url, **settings)
    except ValueError as error:
        raise ValueError(str(error).replace("base_url", "--endpoint", 1)) from None
