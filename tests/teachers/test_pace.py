"""The pace of a teacher, with a clock of the test's own."""

from __future__ import annotations

import pytest

from compact.teachers.endpoint import Failure, retry_after
from compact.teachers.pace import Pace, Patience


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


BUSY = Failure("rate limit", "slow down", busy=True, wait=7.0)


def test_halved_once_a_round_and_grows_again(clock: Clock) -> None:
    pace = Pace(8, clock=clock)
    for _ in range(5):  # all of one round
        pace.failed(100.0, BUSY)
        clock.now += 0.01
    assert pace.limit == 4 and pace.wait(0) == pytest.approx(7 - 0.01)
    pace.failed(101.0, BUSY)
    assert pace.limit == 2
    for _ in range(3):
        pace.succeeded()
    assert 3 < pace.limit < 3.4 and pace.wait(3) is None
    for _ in range(100):
        pace.succeeded()
    assert pace.limit == 8


def test_requests_per_minute(clock: Clock) -> None:
    pace = Pace(8, per_minute=30, clock=clock)
    assert pace.wait(0) == 0
    pace.started()
    assert pace.wait(1) == 2.0


def test_single_bad_replies_stop_nobody(clock: Clock) -> None:
    pace = Pace(8, clock=clock)
    pace.failed(100.0, Failure("broken reply", "no JSON"))
    assert pace.wait(0) == 0 and pace.limit == 8


def test_strikes_wait_longer_and_give_up(clock: Clock) -> None:
    pace = Pace(8, patience=Patience(strikes=6, longest_wait=3.0), clock=clock)
    waits = []
    while pace.given_up is None:
        pace.failed(clock.now, Failure("server error", "status 500", busy=True))
        waits.append(pace.wait(0))
        clock.now += 10
    assert waits == [0, 0, 1, 2, 3, 3]
    assert pace.given_up == "6 failures in a row, the last: status 500"


def test_an_address_where_nobody_ever_answered_is_given_up_sooner(clock: Clock) -> None:
    refused = Failure("connection", "ConnectError", busy=True)
    pace, met = Pace(8, clock=clock), Pace(8, clock=clock)
    met.succeeded()
    for _ in range(5):
        pace.failed(clock.now, refused)
        met.failed(clock.now, refused)
        clock.now += 100
    assert pace.given_up and met.given_up is None


def test_a_fatal_failure_gives_up_at_once(clock: Clock) -> None:
    pace = Pace(8, clock=clock)
    pace.failed(100.0, Failure("unauthorised", "status 401", again=False, fatal=True))
    assert pace.given_up == "status 401"


@pytest.mark.parametrize(
    "headers,seconds",
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
