"""The store of `compact collect`: every answer and every attempt, in one SQLite file.

An answer is found by the hash of its request, so no request is paid twice, whatever run or process
asked it. A process claims a request before it sends it. A claim ends with the attempt, when its
process is dead, or after its lease. Everything that an attempt changes is one transaction, so a
process that is killed at any moment leaves a whole store.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,       -- request_key of the request
    request TEXT NOT NULL,      -- the request, canonical JSON
    teacher TEXT NOT NULL,      -- who was asked first
    model TEXT NOT NULL,        -- as the endpoint names it
    at REAL NOT NULL,           -- seconds since 1970
    text TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    finish TEXT NOT NULL,       -- finish_reason
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY,
    teacher TEXT NOT NULL,
    owner TEXT NOT NULL,        -- host, process and its start time
    until REAL NOT NULL,
    at_most REAL NOT NULL       -- upper bound of the cost
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts (
    key TEXT NOT NULL,
    teacher TEXT NOT NULL,
    at REAL NOT NULL,
    outcome TEXT NOT NULL,      -- 'answer', or the kind of failure
    seconds REAL NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,         -- of the tokens that the endpoint reported
    unknown REAL NOT NULL       -- upper bound of a cost that was not reported
);
"""


class Claim(Enum):
    """What became of the wish to send a request."""

    MINE = "mine"
    DONE = "done"
    BUSY = "busy"
    """Another process is sending it."""
    BUDGET = "budget"
    """Its upper bound does not fit into what is left of the budget."""


@dataclass(frozen=True)
class Answer:
    """What a teacher answered.

    Attributes:
        text: the content of the message; empty if a filter removed it.
        reasoning: the separate reasoning of a reasoning model, or "".
        finish: the finish_reason: `stop`, `length` if it was cut, or the endpoint's own.
        model: the model as the endpoint names it.
        prompt_tokens, completion_tokens: as the endpoint reports them, 0 if it does not.
        at: when it came, in seconds since 1970; 0 before it is stored.
    """

    text: str
    reasoning: str = ""
    finish: str = "stop"
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One row of the ledger: a request that was sent once.

    Attributes:
        outcome: `answer`, or the kind of failure.
        seconds: from sending the request to its end.
        prompt_tokens, completion_tokens: as the endpoint reports them.
        cost: of these tokens.
        unknown: upper bound of the cost where the endpoint may charge but did not report.
    """

    outcome: str
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    unknown: float = 0.0


def canonical(value: Any) -> str:
    """Returns a JSON value in its one canonical form: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def request_key(request: dict[str, Any], sample: int) -> str:
    """Returns the SHA-256 of a request and the number of its sample, in hexadecimal.

    Args:
        request: model, messages and sampling parameters.
        sample: 0 for the first sample of this request.
    """
    return hashlib.sha256(canonical([request, sample]).encode("utf-8")).hexdigest()


class Store:
    """The answers and attempts in a file. Several processes may have it open."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file, or makes it.

        Raises:
            ValueError: the file is something else.
            OSError: it cannot be read or written.
        """
        self.path = Path(path)
        me = psutil.Process()
        self.owner = f"{socket.gethostname()} {me.pid} {me.create_time()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._spent, self._counted = 0.0, 0  # by the attempts up to this rowid
        with self._errors():
            # isolation_level None: transactions are begun and ended here.
            # Used by one thread at a time, but `collect` may run in another one than made it.
            self._db = sqlite3.connect(
                self.path, timeout=60, isolation_level=None, check_same_thread=False
            )
            with self._transaction():  # the journal's mode, set below, is written into the file
                self._check_ours()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # an answer is paid: survive a power cut
            with self._transaction():
                self._check_ours()
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def _check_ours(self) -> None:
        """Raises ValueError if the file is a database of somebody else."""
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version != _VERSION and (version or tables):
            raise ValueError(f"{self.path}: is not a store of this version of `collect`")

    def claim(
        self, key: str, teacher: str, *, lease: float, at_most: float, budget: float | None
    ) -> Claim:
        """Claims a request for this process, unless it is answered, claimed or too dear.

        Args:
            key: of the request.
            teacher: who will be asked.
            lease: seconds after which others may take the claim over.
            at_most: upper bound of its cost.
            budget: most that the store may cost in all; claims and unreported costs count at their
                upper bounds. None: no limit.
        """
        with self._errors(), self._transaction():
            if self._db.execute("SELECT 1 FROM answers WHERE key = ?", [key]).fetchone():
                return Claim.DONE
            self._end_lost_claims()
            if self._db.execute("SELECT 1 FROM claims WHERE key = ?", [key]).fetchone():
                return Claim.BUSY
            if budget is not None and self._committed() + at_most > budget + 1e-12:
                return Claim.BUDGET
            row = [key, teacher, self.owner, time.time() + lease, at_most]
            self._db.execute("INSERT INTO claims VALUES (?, ?, ?, ?, ?)", row)
            return Claim.MINE

    def close_attempt(
        self,
        key: str,
        teacher: str,
        attempt: Attempt,
        answer: Answer | None = None,
        request: dict[str, Any] | None = None,
    ) -> None:
        """Ends a claim: enters the attempt and, if it has one, the answer. All or nothing."""
        now = time.time()
        with self._errors(), self._transaction():
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", [key, self.owner])
            self._enter(key, teacher, now, attempt)
            if answer is not None:
                row = [key, canonical(request), teacher, answer.model, now]
                row += [answer.text, answer.reasoning, answer.finish]
                row += [answer.prompt_tokens, answer.completion_tokens]
                # Another process may have taken over an expired claim: the first answer stays.
                self._db.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row
                )

    def release(self) -> None:
        """Ends the claims of this process, whose requests were given up."""
        with self._errors(), self._transaction():
            self._lose("owner = ?", [self.owner])

    def keys(self) -> set[str]:
        """Returns the keys of all answers."""
        with self._errors():
            return {key for (key,) in self._db.execute("SELECT key FROM answers")}

    def answers(self, keys: Sequence[str]) -> dict[str, Answer]:
        """Returns key -> answer for the keys that have one."""
        columns = "text, reasoning, finish, model, prompt_tokens, completion_tokens, at"
        found = {}
        with self._errors():
            for key in keys:
                row = self._db.execute(
                    f"SELECT {columns} FROM answers WHERE key = ?", [key]
                ).fetchone()
                if row is not None:
                    found[key] = Answer(*row)
        return found

    def attempts(self) -> Iterator[tuple[str, str, Attempt]]:
        """Yields (key, teacher, attempt) of every attempt, in order."""
        with self._errors():
            yield from (
                (row[0], row[1], Attempt(*row[2:]))
                for row in self._db.execute(
                    "SELECT key, teacher, outcome, seconds, prompt_tokens, completion_tokens, "
                    "cost, unknown FROM attempts ORDER BY rowid"
                )
            )

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _committed(self) -> float:
        """What was spent, plus the upper bounds of what may have been or is being spent."""
        spent, counted = self._db.execute(
            "SELECT total(cost + unknown), max(rowid) FROM attempts WHERE rowid > ?",
            [self._counted],
        ).fetchone()
        self._spent, self._counted = self._spent + spent, counted or self._counted
        (claimed,) = self._db.execute("SELECT total(at_most) FROM claims").fetchone()
        return self._spent + float(claimed)

    def _end_lost_claims(self) -> None:
        """Ends the claims of processes that are dead, and those whose lease is over."""
        self._lose("until < ?", [time.time()])
        owners = self._db.execute(
            "SELECT DISTINCT owner FROM claims WHERE owner != ?", [self.owner]
        ).fetchall()
        for (owner,) in owners:
            if not _alive(owner):
                self._lose("owner = ?", [owner])

    def _lose(self, which: str, values: list[Any]) -> None:
        """Turns claims into attempts whose outcome nobody knows."""
        rows = self._db.execute(
            f"SELECT key, teacher, at_most FROM claims WHERE {which}", values
        ).fetchall()
        for key, teacher, at_most in rows:
            self._enter(key, teacher, time.time(), Attempt("lost", unknown=at_most))
        if rows:
            self._db.execute(f"DELETE FROM claims WHERE {which}", values)

    def _enter(self, key: str, teacher: str, at: float, attempt: Attempt) -> None:
        row = [key, teacher, at, attempt.outcome, attempt.seconds, attempt.prompt_tokens]
        row += [attempt.completion_tokens, attempt.cost, attempt.unknown]
        self._db.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and no other process writes meanwhile."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._spent, self._counted = 0.0, 0  # it may have counted rows that go
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the errors of SQLite into those of this project."""
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full disk, read-only
            raise OSError(f"{self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: expected a store of `collect`, got {error}") from None


def _alive(owner: str) -> bool:
    """Whether the process of a claim may still run; True where this host cannot tell."""
    host, pid, started = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) < 1)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return os.path.exists(f"/proc/{pid}")
