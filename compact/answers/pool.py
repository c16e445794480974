"""Runs a checker of answers in processes that can be killed.

This file imports neither torch nor transformers, because the processes of `CheckerPool` import it.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

START_LIMIT = 120.0
"""Most seconds for the start of a checker process, with its imports."""
TIMEOUT = 10.0
"""Most seconds for one item."""
_DIED = "checker died"


@dataclass(frozen=True)
class Outcome:
    """The result for one pair; `note` says why it failed ("timeout", "checker died"), else ""."""

    correct: bool
    note: str = ""


class CheckerStartError(OSError, RuntimeError):
    """A process of the answer checker could not be started."""


Check = Callable[[str, str], bool]


class _Worker:
    """One checker process and its current item.

    The process is a new Python interpreter. A fork may deadlock if torch runs threads in the
    parent. The "spawn" of multiprocessing would run the user's script again, which may have no
    `if __name__ == "__main__"`.
    """

    def __init__(self, check: Check) -> None:
        self.pipe, other = Pipe()
        code = (
            "import sys; sys.path[:] = sys.argv[2:]; "
            "from compact.answers.pool import _serve; _serve(int(sys.argv[1]))"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(other.fileno()), *sys.path],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )
            self.pipe.send((check.__module__, check.__qualname__))
        except OSError as error:
            self.pipe.close()
            raise CheckerStartError(
                f"the answer checker could not start a process: {error}"
            ) from error
        finally:
            other.close()
        self.ready = False
        self.item: int | None = None
        self.pair = ("", "")
        self.deadline = time.monotonic() + START_LIMIT

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def _serve(descriptor: int) -> None:
    """Runs in the checker process: checks one pair after another until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the parent kills this process
    pipe: Connection[Any, Any] = Connection(descriptor)
    module, name = pipe.recv()
    checker: Any = importlib.import_module(module)
    for part in name.split("."):
        checker = getattr(checker, part)
    importlib.import_module("math_verify")
    # It warns at every call that its own time limits are off; here the parent sets the limit.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pipe.send("ready")
    while True:
        try:
            pair = pipe.recv()
        except EOFError:
            return
        try:
            outcome = Outcome(checker(*pair))
        except Exception as error:
            outcome = Outcome(False, f"{type(error).__name__}: {error}"[:200])
        pipe.send(outcome)


class CheckerPool:
    """Runs a checker in separate processes, and kills a process that takes too long.

    If the checker hangs or crashes, its item fails ("timeout", "checker died") and a new process
    replaces the old one. An item fails as "checker died" only if it ends a second process too: the
    first may have been killed from outside, even before it got the item.

    Args:
        check: the checker, a function at the top level of a module that can be imported by name.
        processes: processes that run at the same time.
        timeout: seconds for one item before its process is killed.

    Raises:
        ValueError: `check` is defined in the main script, which a process cannot import.
        RuntimeError: a process cannot be started.
    """

    def __init__(self, check: Check, *, processes: int = 2, timeout: float = TIMEOUT) -> None:
        if check.__module__ == "__main__" or "<" in check.__qualname__:
            raise ValueError(
                "check: expected a top-level function of an importable module, found "
                f"{check.__module__}.{check.__qualname__}"
            )
        self.check = check
        self.timeout = timeout
        self.workers: list[_Worker] = []
        self.retried: set[int] = set()  # items of the current call that were given twice
        for _ in range(processes):
            self.workers.append(_Worker(check))

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        """Returns the outcome of each pair.

        Raises:
            RuntimeError: a checker process could not be started.
        """
        outcomes: dict[int, Outcome] = {}
        todo = deque(enumerate(pairs))
        self.retried = set()
        for worker in list(self.workers):
            if worker.ready:
                self._give(worker, todo, outcomes)
        while len(outcomes) < len(pairs):
            busy = [w for w in self.workers if w.item is not None or not w.ready]
            left = min(w.deadline for w in busy) - time.monotonic()
            answered = wait([w.pipe for w in busy], timeout=max(0.0, left))
            for worker in busy:
                if worker.pipe in answered:
                    self._receive(worker, todo, outcomes)
                elif worker.deadline <= time.monotonic():
                    self._replace(worker, outcomes, "timeout")
            for worker in list(self.workers):
                if worker.ready and worker.item is None:
                    self._give(worker, todo, outcomes)
        return [outcomes[i] for i in range(len(pairs))]

    def _give(
        self,
        worker: _Worker,
        todo: deque[tuple[int, tuple[str, str]]],
        outcomes: dict[int, Outcome],
    ) -> None:
        """Sends the next pair, if any is left, to an idle worker."""
        if todo and worker.process.poll() is not None:  # it died while it was idle
            self._replace(worker, outcomes, _DIED)
        elif todo:
            worker.item, worker.pair = todo.popleft()
            worker.deadline = time.monotonic() + self.timeout
            try:
                worker.pipe.send(worker.pair)
            except OSError:
                self._died(worker, todo, outcomes)

    def _receive(
        self,
        worker: _Worker,
        todo: deque[tuple[int, tuple[str, str]]],
        outcomes: dict[int, Outcome],
    ) -> None:
        """Handles a message of a worker: it is ready, it has an outcome, or it has ended."""
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            self._died(worker, todo, outcomes)
            return
        if not worker.ready:
            worker.ready = True
        elif worker.item is not None:
            outcomes[worker.item] = message
            worker.item = None

    def _died(
        self,
        worker: _Worker,
        todo: deque[tuple[int, tuple[str, str]]],
        outcomes: dict[int, Outcome],
    ) -> None:
        """Replaces a worker that has ended; its item is tried once more."""
        if worker.item is not None and worker.item not in self.retried:
            self.retried.add(worker.item)
            todo.appendleft((worker.item, worker.pair))
            worker.item = None
        self._replace(worker, outcomes, _DIED)

    def _replace(self, worker: _Worker, outcomes: dict[int, Outcome], note: str) -> None:
        """Kills a worker, marks its item as failed, and starts a new worker."""
        worker.kill()
        if not worker.ready:
            raise CheckerStartError(f"the answer checker could not start a process: {note}")
        if worker.item is not None:
            outcomes[worker.item] = Outcome(False, note)
        self.workers[self.workers.index(worker)] = _Worker(self.check)

    def close(self) -> None:
        """Ends every process."""
        for worker in self.workers:
            worker.kill()
        self.workers = []


# The pool that `Domain.matches` uses: started when first needed, used by one thread at a time,
# closed when the interpreter exits.
_shared: CheckerPool | None = None
_lock = threading.Lock()


def _close_shared() -> None:
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


def _forget_shared() -> None:
    """Resets the pool and lock in a forked child: the old ones belong to the parent."""
    global _shared, _lock
    _shared, _lock = None, threading.Lock()


atexit.register(_close_shared)
os.register_at_fork(after_in_child=_forget_shared)


def checked_apart(check: Check, a: str, b: str) -> bool:
    """Returns check(a, b), computed in a separate process; False if it takes too long.

    There is one such process. A call with another checker replaces it. A check that was killed for
    its time is not tried again, but one whose process died is.

    Raises:
        RuntimeError: the checker process could not be started.
    """
    try:
        return _checked_apart(check, a, b)
    except _Died:
        return False


class _Died(Exception):
    """The checker process died; as an error, so that it is not kept as a result."""


@lru_cache(maxsize=65536)
def _checked_apart(check: Check, a: str, b: str) -> bool:
    global _shared
    with _lock:
        if _shared is not None and _shared.check is not check:
            _close_shared()
        if _shared is None:
            _shared = CheckerPool(check, processes=1)
        try:
            outcome = _shared([(a, b)])[0]
        except BaseException:  # Ctrl-C or a failed start: the pool may be inconsistent
            _close_shared()
            raise
    if outcome.note == _DIED:
        raise _Died
    return outcome.correct
