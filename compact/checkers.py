"""Judges completions against gold answers: numbers, choice letters, mathematics (math-verify).

This file imports neither torch nor transformers, because the processes of `CheckerPool` import it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal

from compact.answers import answers_match, extract_answer, parse_number
from compact.text.steps import find_marker

Kind = Literal["auto", "number", "choice", "math"]
KINDS: tuple[Kind, ...] = ("auto", "number", "choice", "math")

CHOICE = re.compile(r"\(?([A-Ja-j])[).:]?")
# A letter that is offered as a choice: "(B)", "B)", "**B**", or a capital that stands alone.
_OFFERED = re.compile(r"\(([A-Ja-j])\)|(?<![\w'])([A-J])(?![\w'])")
# "A" and "I" also are words: alone they count only where no letter follows in the sentence.
_WORD = re.compile(r"\s+[a-z]")
START_LIMIT = 120.0
"""Seconds that a checker process may take to import what it needs."""


@dataclass(frozen=True)
class Verdict:
    """How one completion was judged.

    Attributes:
        predicted: the answer that was read out of the completion, None if there is none.
        correct: whether it matches the gold answer.
        note: why an item could not be judged ("timeout", "checker died"), else "".
    """

    predicted: str | None
    correct: bool
    note: str = ""


def check_number(completion: str, gold: str) -> Verdict:
    """Judges by the final answer: as numbers where both are, else as normalised text."""
    predicted = extract_answer(completion)
    return Verdict(predicted, answers_match(predicted, gold))


def check_choice(completion: str, gold: str) -> Verdict:
    """Judges by the choice letter: the first one offered after the answer marker, else the last.

    Raises:
        ValueError: `gold` is not a letter from A to J, as in "B", "(b)" or "B.".
    """
    wanted = CHOICE.fullmatch(gold.strip())
    if not wanted:
        raise ValueError(f"gold must be a choice letter from A to J, got {gold!r}")
    marker = find_marker(completion)
    letters = [
        (found[1] or found[2]).upper()
        for found in _OFFERED.finditer(completion, marker if marker < len(completion) else 0)
        if found[1] or found[2] not in "AI" or not _WORD.match(completion, found.end())
    ]
    if not letters:
        return Verdict(None, False)
    predicted = letters[0] if marker < len(completion) else letters[-1]
    return Verdict(predicted, predicted == wanted[1].upper())


def check_math(completion: str, gold: str) -> Verdict:
    """Judges with math-verify: the two answers are the same as mathematical objects.

    It may hang on a hostile expression, and its own time limit is a SIGALRM that neither works
    outside the main thread nor stops compiled code: call it through `CheckerPool`.
    """
    from math_verify import parse, verify

    def read(text: str) -> list[object]:
        bare = "$" not in text and "\\boxed" not in text and "\\(" not in text
        return parse(f"${text}$" if bare else text, parsing_timeout=None)

    marker = find_marker(completion)
    if marker == len(completion):
        answer = parse(completion, parsing_timeout=None)
    else:
        line = completion[marker:].strip().split("\n", 1)[0]
        text = re.sub(r"^.*?\banswer(?:\s+is)?\b[\s:]*|^#+\s*", "", line, flags=re.IGNORECASE)
        answer = read(text.rstrip(" ."))
    if not answer:
        return Verdict(None, False)
    return Verdict(str(answer[-1]), verify(read(gold), answer, timeout_seconds=None))


def kind_of(gold: str) -> Kind:
    """Returns how a gold answer is to be judged: "number", "choice" or "math"."""
    if parse_number(gold) is not None:
        return "number"
    if CHOICE.fullmatch(gold.strip()):
        return "choice"
    # Words ("blue", "New York") are compared as text; symbols, digits or commands are mathematics.
    return "math" if re.search(r"[\\^_=+*/$\d]", gold) else "number"


Check = Callable[[str, str], Verdict]
DIRECT: dict[Kind, Check] = {"number": check_number, "choice": check_choice}


class Judge:
    """Judges completions; mathematics goes to a pool of processes, started when first needed.

    Args:
        kind: how to judge every item; "auto" decides by its gold answer.
        timeout: seconds that mathematics may take for one item.

    Raises:
        ValueError: `kind` is unknown.
    """

    def __init__(self, kind: Kind = "auto", timeout: float = 10.0) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.timeout = timeout
        self.pool: CheckerPool | None = None

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Returns the verdict of each (completion, gold) pair."""
        kinds = [kind_of(gold) if self.kind == "auto" else self.kind for _, gold in pairs]
        hard = [pair for kind, pair in zip(kinds, pairs, strict=True) if kind == "math"]
        if hard and self.pool is None:
            self.pool = CheckerPool(check_math, timeout=self.timeout)
        slow = iter(self.pool(hard) if self.pool and hard else ())
        return [
            next(slow) if kind == "math" else DIRECT[kind](*pair)
            for kind, pair in zip(kinds, pairs, strict=True)
        ]

    def close(self) -> None:
        """Ends the processes, if any were started."""
        if self.pool:
            self.pool.close()
            self.pool = None


class _Worker:
    """One checker process and the item that it works on."""

    def __init__(self, check: Check) -> None:
        # spawn: a fork of a process whose torch runs threads may deadlock.
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(other, check), daemon=True, name="compact-checker"
        )
        self.process.start()
        other.close()
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_LIMIT

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, check: Check) -> None:
    """Runs in the checker process: answers one pair after another until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this one
    importlib.import_module("math_verify")
    # It warns at every call that its own time limits are off; the limit here is the kill.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    pipe.send("ready")
    while True:
        try:
            pair = pipe.recv()
        except EOFError:
            return
        try:
            verdict = check(*pair)
        except Exception as error:
            verdict = Verdict(None, False, f"{type(error).__name__}: {error}"[:200])
        pipe.send(verdict)


class CheckerPool:
    """Runs a checker in processes of its own, and kills one that takes too long.

    A hanging or crashing checker costs its item ("timeout", "checker died") and a new process.

    Args:
        check: the checker, importable from its module.
        processes: how many run at once.
        timeout: seconds an item may take before its process is killed.
    """

    def __init__(self, check: Check, *, processes: int = 2, timeout: float = 10.0) -> None:
        self.check = check
        self.timeout = timeout
        self.workers = [_Worker(check) for _ in range(processes)]

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Returns the verdict of each (completion, gold) pair.

        Raises:
            RuntimeError: a checker process could not be started.
        """
        verdicts: dict[int, Verdict] = {}
        todo = iter(enumerate(pairs))
        for worker in self.workers:
            if worker.ready:
                self._give(worker, todo)
        while len(verdicts) < len(pairs):
            busy = [w for w in self.workers if w.item is not None or not w.ready]
            left = min(w.deadline for w in busy) - time.monotonic()
            answered = wait([w.pipe for w in busy], timeout=max(0.0, left))
            for worker in busy:
                if worker.pipe in answered:
                    self._receive(worker, verdicts)
                elif worker.deadline <= time.monotonic():
                    self._replace(worker, verdicts, "timeout")
            for worker in self.workers:
                if worker.ready and worker.item is None:
                    self._give(worker, todo)
        return [verdicts[i] for i in range(len(pairs))]

    def _give(self, worker: _Worker, todo: enumerate[tuple[str, str]]) -> None:
        """Hands the next pair to an idle worker, if there is one."""
        item = next(todo, None)
        if item is not None:
            worker.item, pair = item
            worker.deadline = time.monotonic() + self.timeout
            worker.pipe.send(pair)

    def _receive(self, worker: _Worker, verdicts: dict[int, Verdict]) -> None:
        """Takes what a worker sent: that it is ready, a verdict, or its end."""
        try:
            message = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker, verdicts, "checker died")
            return
        if not worker.ready:
            worker.ready = True
        elif worker.item is not None:
            verdicts[worker.item] = message
            worker.item = None

    def _replace(self, worker: _Worker, verdicts: dict[int, Verdict], note: str) -> None:
        """Kills a worker, gives its item up, and starts another in its place."""
        if not worker.ready:
            raise RuntimeError(f"a process of the answer checker did not start ({note})")
        if worker.item is not None:
            verdicts[worker.item] = Verdict(None, False, note)
        worker.kill()
        self.workers[self.workers.index(worker)] = _Worker(self.check)

    def close(self) -> None:
        """Ends every process."""
        for worker in self.workers:
            worker.kill()
