"""How fast a teacher is asked: adapts to what its endpoint takes, and gives up on a dead one.

Concurrency grows by one for each round of successes and is halved when the endpoint is busy, as in
TCP (additive increase, multiplicative decrease). Failures of requests that ran at the same time
count as one strike. A success clears the strikes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from compact.teachers.endpoint import Failure

_FREE_STRIKES = 2
"""Strikes that single bad replies explain; from the next one on, all requests wait."""
_STRIKES_UNMET = 5
"""Strikes of an endpoint that has never been reached before it is given up."""


@dataclass(frozen=True)
class Patience:
    """How failures are met.

    Attributes:
        attempts: how often a request is sent in one run; a rate limit does not count.
        first_wait: seconds before the second attempt; doubled for each further one.
        longest_wait: most seconds between attempts. What an endpoint asks for with Retry-After is
            always waited.
        strikes: rounds of failures without a success after which a teacher is given up.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 30.0
    strikes: int = 15

    def wait(self, failures: int) -> float:
        """Returns the seconds to wait after so many failures."""
        return min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))


class Pace:
    """When the next request of a teacher may start.

    Attributes:
        limit: requests that may run at the same time, at least 1; a fraction counts as none.
        given_up: why no further request is sent, or None.
    """

    def __init__(
        self,
        most: int,
        per_minute: float | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts with `most` requests at the same time."""
        self._most, self.limit = most, float(most)
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._patience, self._clock = patience or Patience(), clock
        self._opens = self._slowed = self._struck = 0.0
        self._strikes = 0
        self._met = False
        self.given_up: str | None = None

    def wait(self, running: int) -> float | None:
        """Returns the seconds until a request may start; None until a running one has ended."""
        if running >= int(self.limit):
            return None
        return max(0.0, self._opens - self._clock())

    def started(self) -> None:
        """Notes that a request has started."""
        self._opens = max(self._opens, self._clock()) + self._gap

    def succeeded(self) -> None:
        """Notes an answer."""
        self._strikes, self._met = 0, True
        self.limit = min(self._most, self.limit + 1.0 / self.limit)

    def failed(self, started: float, failure: Failure) -> None:
        """Notes a failure of a request that started at `started`, by the clock."""
        now = self._clock()
        if failure.fatal:
            self.given_up = str(failure)
        if failure.kind != "connection":
            self._met = True
        if failure.busy and started > self._slowed:
            self.limit = max(1.0, self.limit / 2)
            self._slowed = now
        if started > self._struck:
            self._strikes += 1
            self._struck = now
            wait = failure.wait or 0.0
            if failure.wait is None and failure.kind == "rate limit":
                wait = self._patience.wait(self._strikes)
            elif self._strikes > _FREE_STRIKES:
                wait = max(wait, self._patience.wait(self._strikes - _FREE_STRIKES))
            self._opens = max(self._opens, now + wait)
        elif failure.wait:
            self._opens = max(self._opens, now + failure.wait)
        most = self._patience.strikes if self._met else min(_STRIKES_UNMET, self._patience.strikes)
        if self._strikes >= most and self.given_up is None:
            self.given_up = f"{self._strikes} failures in a row, the last: {failure}"
