"""`compact evaluate` in several processes: each answers a part of the questions, on its own GPU.

Process k of N answers every N-th question from the k-th on into OUT.part-k.jsonl, from which it
resumes when it was killed. Then the parts are joined into OUT, as one process would have written
it. Batches have other neighbours than in one process, which changes answers by rounding only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from compact.data import Problem
from compact.evaluation.evaluate import ITEM, summarise
from compact.files import json_lines
from compact.resumable import ResumableRows, remove_rows


def part_of(text: str) -> tuple[int, int]:
    """Returns (k, N) of "k/N".

    Raises:
        ValueError: it is no such text.
    """
    k, _, count = text.partition("/")
    if not (k.isdecimal() and count.isdecimal() and 1 <= int(k) <= int(count)):
        raise ValueError(f"--part must be k/N with k from 1 to N, got {text!r}")
    return int(k), int(count)


def part_file(out: Path, k: int) -> Path:
    """Returns the file of answers of process k, from 1."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.part-{k}.jsonl")


def evaluate_in_processes(
    problems: Sequence[Problem],
    out: Path,
    count: int,
    options: Sequence[str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Answers the problems in `count` processes; returns the summary, as `evaluate` does.

    Args:
        problems: the questions.
        out: the item file.
        count: the number of processes; no more are started than there are questions.
        options: the command line of `compact evaluate`, without those for several processes.
        settings: what identifies the run, as in `evaluate`, max_new_tokens included.

    Raises:
        ValueError: a process failed, or `out` belongs to another run.
    """
    start = time.monotonic()
    ids = [problem.question_id for problem in problems]
    with ResumableRows(out, settings, key="question_id", shape=ITEM) as rows:
        if any(i not in rows.done for i in ids):
            parts = [part_file(out, k) for k in range(1, min(count, len(ids)) + 1)]
            _run(options, len(parts))
            for part in parts:
                for _, _, item in json_lines(part):
                    if item["question_id"] not in rows.done:
                        rows.append(item)
            for part in parts:
                remove_rows(part)
        summary = summarise(rows.done[i] for i in ids)
        summary["seconds"] = round(time.monotonic() - start, 1)
        rows.complete(summary)
    return summary


def _run(options: Sequence[str], count: int) -> None:
    """Runs the processes; only the first shows its progress."""
    with ExitStack() as files:
        # Files and no pipes: a full pipe would hold a process up while another is waited for.
        told = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "compact", "evaluate", *options, "--part", f"{k}/{count}"],
                stdout=subprocess.DEVNULL,
                stderr=None if k == 1 else file,
            )
            for k, file in enumerate(told, 1)
        ]
        try:
            for process in processes:
                process.wait()
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        for k, (process, file) in enumerate(zip(processes, told, strict=True), 1):
            if process.returncode:
                file.seek(0)
                lines = [line for line in file.read().splitlines() if "error:" in line]
                why = lines[-1].partition("error: ")[2] if lines else ""
                why = why or f"status {process.returncode}"
                raise ValueError(f"process {k} of {count} failed: {why}")
