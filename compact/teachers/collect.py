"""The loop of `compact collect`: asks several teachers many questions, each request once.

Every teacher has its own pace and its own fate. All answers go to the store as they come, so the
loop can be killed at any moment and started again.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from compact.data.problems import Problem
from compact.teachers.endpoint import Endpoint, Failure
from compact.teachers.pace import Pace, Patience
from compact.teachers.prompts import find_template, messages_of
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, Attempt, Claim, Store, canonical, request_key

logger = logging.getLogger(__name__)

_TEMPLATE_TOKENS = 256
"""Most tokens that a chat template adds to a request (assumed)."""
_LEASE_MARGIN = 60.0
"""Seconds of a lease beyond the time limit of a request."""
_BUSY_WAIT = 0.5
"""Seconds between two looks at a request that another process sends."""
_LATE_ATTEMPTS = 3
"""Most attempts of a request that always exceeds the time limit. Each of them may cost money."""


class Asker(Protocol):
    """What answers requests: `Endpoint` or `Local`."""

    async def ask(self, request: dict[str, Any], sample: int) -> Answer:
        """Sends a request once; raises Failure if there is no answer."""

    async def close(self) -> None:
        """Frees what it holds."""


@dataclass(frozen=True)
class Item:
    """One request: a teacher's sample of a question.

    Attributes:
        problem: the question.
        sample: number of the sample, from 0.
        request: model, messages and sampling parameters.
        key: of the request and the sample, as in the store.
        at_most: upper bound of the cost.
    """

    problem: Problem
    sample: int
    request: dict[str, Any]
    key: str
    at_most: float


Plans = Sequence[tuple[Teacher, Sequence[Item]]]


@dataclass
class Result:
    """How a run ended for one teacher.

    Attributes:
        answered: requests that have an answer now, of this or an earlier run.
        missing: requests that have none.
        reason: why the teacher was given up, or None.
        failures: kind -> how often, in this run.
    """

    answered: int = 0
    missing: int = 0
    reason: str | None = None
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def refused(self) -> int:
        """Requests that no other run gets an answer to."""
        return self.failures["refused"]

    @property
    def left(self) -> int:
        """Requests without an answer that another run may get."""
        return self.missing - self.refused


def plan(teacher: Teacher, problems: Sequence[Problem]) -> list[Item]:
    """Returns the requests of a teacher, question by question.

    Raises:
        ValueError: a prompt cannot be put to it; the message names the question_id.
    """
    template, parameters = find_template(teacher.template), teacher.parameters()
    items = []
    for problem in problems:
        try:
            messages = messages_of(problem.prompt, template, teacher.system)
        except ValueError as error:
            raise ValueError(f"question_id {problem.question_id!r}: {error}") from None
        request = {**parameters, "messages": messages}
        # A token is at least one byte.
        tokens = len(canonical(messages).encode("utf-8")) + _TEMPLATE_TOKENS
        at_most = teacher.cost(tokens, teacher.most_tokens or 0)
        items += [
            Item(problem, sample, request, request_key(request, sample), at_most)
            for sample in range(teacher.n)
        ]
    return items


def open_asker(teacher: Teacher) -> Asker:
    """Returns what answers for a teacher.

    Raises:
        ImportError, OSError, ValueError: it cannot be made.
    """
    if teacher.local is None:
        return Endpoint(teacher)
    from compact.teachers.local import Local  # loads torch

    return Local(teacher)


def collect(
    store: Store,
    plans: Plans,
    *,
    budget: float | None = None,
    patience: Patience | None = None,
    answered: Callable[[Teacher, Item], None] = lambda teacher, item: None,
) -> dict[str, Result]:
    """Asks every teacher the requests that the store has no answer for.

    Args:
        store: where answers and attempts go.
        plans: each teacher with its requests.
        budget: most that everything in the store may cost, in the currency of the prices.
        patience: how failures are met.
        answered: called for each request that has an answer, new or not.

    Returns:
        Name of the teacher -> how it went.

    Raises:
        ValueError: a key's variable is not set, or the budget needs a price or a limit that a
            teacher lacks.
        ImportError, OSError: a teacher cannot be opened, or the store cannot be written.
    """
    if budget is not None:
        for teacher, _ in plans:
            if teacher.local is None and not teacher.price:
                raise ValueError(
                    f"teacher {teacher.name!r}: price must be given with a budget, got none; of a "
                    "server that costs nothing it is {in: 0, out: 0}"
                )
            if teacher.price.get("out") and teacher.most_tokens is None:
                raise ValueError(
                    f"teacher {teacher.name!r}: max_tokens must be given with a budget, got none"
                )
    try:
        return _run(_collect(store, plans, budget, patience or Patience(), answered))
    finally:
        store.release()


def _run(work: Coroutine[Any, Any, dict[str, Result]]) -> dict[str, Result]:
    """Runs a coroutine to its end.

    In a notebook an event loop already runs in this thread. Then another thread is used.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(loop.run_until_complete, task).result()
        except KeyboardInterrupt:  # the thread gets no signal
            loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            pool.submit(loop.close)


def ask_all(
    store: Store,
    teacher: Teacher,
    problems: Sequence[Problem],
    *,
    called: str,
    budget: float | None = None,
    answered: Callable[[Teacher, Item], None] = lambda teacher, item: None,
) -> list[tuple[Item, Answer | None]]:
    """Asks one teacher all questions; returns its answers, None for a request that is refused.

    Args:
        store: where answers and attempts go.
        teacher: who is asked.
        problems: the questions.
        called: what a message calls the teacher.
        budget: most that everything in the store may cost, as in `collect`.
        answered: called for each request that has an answer, as in `collect`.

    Raises:
        ValueError: a request has no answer and was not refused; or as in `collect` and `plan`.
        ImportError, OSError: as in `collect`.
    """
    items = plan(teacher, problems)
    result = collect(store, [(teacher, items)], budget=budget, answered=answered)[teacher.name]
    if result.left:
        raise ValueError(
            f"{called}: {result.missing} of {len(items)} requests have no answer "
            f"({result.reason or dict(result.failures)}); the same command asks for them again"
        )
    answers = store.answers([item.key for item in items])
    return [(item, answers.get(item.key)) for item in items]


async def _collect(
    store: Store,
    plans: Plans,
    budget: float | None,
    patience: Patience,
    answered: Callable[[Teacher, Item], None],
) -> dict[str, Result]:
    sending: set[str] = set()
    runs = [
        _Run(teacher, open_asker(teacher), items, store, budget, patience, answered, sending)
        for teacher, items in plans
    ]
    try:
        await asyncio.gather(*(run.run() for run in runs))
    finally:
        for run in runs:
            await run.close()
    return {run.teacher.name: run.result for run in runs}


class _Run:
    """The requests of one teacher in one run."""

    def __init__(
        self,
        teacher: Teacher,
        asker: Asker,
        items: Sequence[Item],
        store: Store,
        budget: float | None,
        patience: Patience,
        answered: Callable[[Teacher, Item], None],
        sending: set[str],
    ) -> None:
        self.teacher, self.result = teacher, Result()
        self._asker, self._store, self._budget, self._patience = asker, store, budget, patience
        self._answered, self._sending = answered, sending  # keys, of all teachers of this process
        # A local model writes one answer at a time; what waits for it must not be claimed.
        most = teacher.concurrency if teacher.local is None else 1
        self._pace = Pace(most, teacher.requests_per_minute, patience)
        # (when it may be sent, its place in the order, attempts so far)
        self._items = items
        self._told_late = False
        self._waiting: list[tuple[float, int, int]] = []
        known = store.keys()
        for place, item in enumerate(items):
            if item.key in known:
                self._has_answer(item)
            else:
                self._waiting.append((0.0, place, 0))
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Sends the requests until each has an answer or is given up."""
        while (self._waiting and self._pace.given_up is None) or self._tasks:
            wait = self._start()
            if self._tasks:
                done, _ = await asyncio.wait(
                    self._tasks, timeout=wait, return_when=asyncio.FIRST_COMPLETED
                )
                self._tasks -= done
                for task in done:
                    task.result()  # raises what went wrong here, such as a full disk
            elif wait:
                await asyncio.sleep(wait)
        self.result.reason = self._pace.given_up
        self.result.missing = len(self._items) - self.result.answered
        if self.result.reason:
            logger.warning("teacher %s: given up: %s", self.teacher.name, self.result.reason)

    async def close(self) -> None:
        """Ends what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._asker.close()

    def _start(self) -> float | None:
        """Starts what may start; seconds until the next look, None until a request has ended."""
        while self._waiting and self._pace.given_up is None:
            wait = self._pace.wait(len(self._tasks))
            if wait is None:
                return None
            now = time.monotonic()
            wait = max(wait, self._waiting[0][0] - now)
            if wait > 0:
                return wait
            _, place, attempts = heapq.heappop(self._waiting)
            item = self._items[place]
            claim = self._store.claim(
                item.key,
                self.teacher.name,
                lease=self.teacher.timeout + _LEASE_MARGIN,
                at_most=item.at_most,
                budget=self._budget,
            )
            if claim is Claim.DONE:
                self._has_answer(item)
            elif claim is Claim.MINE:
                self._pace.started()
                self._sending.add(item.key)
                self._tasks.add(asyncio.create_task(self._attempt(place, attempts)))
            else:
                heapq.heappush(self._waiting, (now + _BUSY_WAIT, place, attempts))
                if claim is Claim.BUDGET and self._sending:
                    return _BUSY_WAIT  # a request that ends may leave enough
                if claim is Claim.BUDGET:
                    self._pace.given_up = f"the next request could exceed --budget {self._budget:g}"
        return None

    async def _attempt(self, place: int, attempts: int) -> None:
        item = self._items[place]
        started = time.monotonic()
        try:
            answer = await self._asker.ask(item.request, item.sample)
        except Failure as failure:
            kept = None if self._failed(place, attempts, started, failure) else failure.answer
            self._note(item, failure.kind, started, failure.usage, failure.billed, kept)
            if kept is not None:
                self._pace.succeeded()
                self._has_answer(item)
        else:
            usage = (answer.prompt_tokens, answer.completion_tokens)
            self._note(item, "answer", started, usage, usage == (0, 0), answer)
            self._pace.succeeded()
            self._has_answer(item)
        finally:
            self._sending.discard(item.key)

    def _note(
        self,
        item: Item,
        outcome: str,
        started: float,
        usage: tuple[int, int],
        unknown: bool,
        answer: Answer | None = None,
    ) -> None:
        """Enters an attempt into the store."""
        attempt = Attempt(
            outcome,
            time.monotonic() - started,
            *usage,
            cost=self.teacher.cost(*usage),
            unknown=item.at_most if unknown else 0.0,
        )
        self._store.close_attempt(item.key, self.teacher.name, attempt, answer, item.request)

    def _failed(self, place: int, attempts: int, started: float, failure: Failure) -> bool:
        """Decides whether a request is sent again, which it returns, and when."""
        self.result.failures[failure.kind] += 1
        self._pace.failed(started, failure)
        late, most = failure.kind == "timeout", self._patience.attempts
        attempts += math.ceil(most / _LATE_ATTEMPTS) if late else failure.kind != "rate limit"
        again = failure.again and attempts < most
        if late and not again and not self._told_late:
            self._told_late = True
            logger.warning(
                "teacher %s: %s in several attempts; raise the teacher's timeout if its answers "
                "take that long",
                *(self.teacher.name, failure),
            )
        if again:
            # By half to once the wait, so that requests do not all return at the same time.
            spread = 0.5 + (place * 0.618034) % 1.0 / 2
            ready = time.monotonic() + spread * self._patience.wait(max(1, attempts))
            heapq.heappush(self._waiting, (ready, place, attempts))
        return again

    def _has_answer(self, item: Item) -> None:
        self.result.answered += 1
        self._answered(self.teacher, item)
