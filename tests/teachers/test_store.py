"""The store: claims, leases, budget, and files that are something else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compact.teachers.store import Answer, Attempt, Claim, Store, request_key

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "s.sqlite")


def claim(store: Store, key: str, **settings: float) -> Claim:
    given = {"lease": 60.0, "at_most": 0.0, "budget": None, **settings}
    return store.claim(key, "a", **given)  # type: ignore[arg-type]


def test_the_key_of_a_request() -> None:
    other = dict(reversed(list(REQUEST.items())))
    assert request_key(REQUEST, 0) == request_key(other, 0)
    assert request_key(REQUEST, 0) != request_key(REQUEST, 1)
    assert request_key(REQUEST, 0) != request_key(REQUEST | {"temperature": 0.6}, 0)


def test_claims(store: Store) -> None:
    other = Store(store.path)
    other.owner += "1"  # as of another process of this host that runs
    assert claim(store, "k") is Claim.MINE
    assert claim(store, "k") is Claim.BUSY
    store.close_attempt("k", "a", Attempt("timeout"))
    assert claim(store, "k") is Claim.MINE
    store.close_attempt("k", "a", Attempt("answer"), Answer("text", "why", "stop", "m", 3, 4), {})
    assert claim(store, "k") is Claim.DONE
    (answer,) = other.answers(["k", "gone"]).values()
    assert (answer.text, answer.reasoning, answer.completion_tokens) == ("text", "why", 4)
    assert [attempt.outcome for _, _, attempt in store.attempts()] == ["timeout", "answer"]


def test_a_lease_ends(store: Store) -> None:
    assert claim(store, "k", lease=-1.0) is Claim.MINE
    assert claim(store, "k") is Claim.MINE
    assert [attempt.outcome for _, _, attempt in store.attempts()] == ["lost"]


def test_the_claim_of_a_dead_process_ends(store: Store) -> None:
    code = (
        "import sys; from compact.teachers.store import Store; "
        "print(Store(sys.argv[1]).claim('k', 'a', lease=1e6, at_most=2.0, budget=None))"
    )
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
    assert claim(store, "k", at_most=2.0, budget=3.0) is Claim.BUDGET  # the lost one may cost 2
    assert claim(store, "k", at_most=1.0, budget=3.0) is Claim.MINE


def test_the_budget_counts_what_runs_and_what_is_unknown(store: Store) -> None:
    assert claim(store, "a", at_most=2.0, budget=5.0) is Claim.MINE
    assert claim(store, "b", at_most=3.0, budget=5.0) is Claim.MINE
    assert claim(store, "c", at_most=0.1, budget=5.0) is Claim.BUDGET
    store.close_attempt("a", "a", Attempt("answer", cost=0.5), Answer("x"), {})
    assert claim(store, "c", at_most=1.5, budget=5.0) is Claim.MINE
    store.close_attempt("b", "a", Attempt("timeout", unknown=3.0))
    assert claim(store, "d", at_most=0.1, budget=5.0) is Claim.BUDGET


def test_the_budget_counts_each_attempt_once(store: Store) -> None:
    """Those of other processes too, and not those of a transaction that was undone."""
    other = Store(store.path)
    other.owner += "1"
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON claims WHEN NEW.key = 'z' "
                      "BEGIN SELECT RAISE(FAIL, 'full'); END")  # fmt: skip
    for key, each, cost in (("a", store, 1.0), ("b", other, 2.0), ("c", store, 1.5)):
        assert claim(each, key, budget=9.0) is Claim.MINE
        each.close_attempt(key, "a", Attempt("timeout", cost=cost / 2, unknown=cost / 2))
    assert claim(store, "l", lease=-1.0, at_most=4.0, budget=9.0) is Claim.MINE  # lost at once
    with pytest.raises(ValueError, match="full"):
        claim(store, "z", at_most=0.1, budget=9.0)
    other.close_attempt("y", "a", Attempt("answer", cost=0.25))
    for each in (store, other):
        assert claim(each, "d", at_most=0.5, budget=9.0) is Claim.BUDGET
        assert claim(each, "d", at_most=0.125, budget=8.875) is Claim.MINE
        each.close_attempt("d", "a", Attempt("refused"))
    read: list[str] = []
    store._db.set_trace_callback(read.append)
    assert claim(store, "e", budget=9.0) is Claim.MINE
    assert [text for text in read if "FROM attempts WHERE rowid > 5" in text]


def test_released_claims_are_lost_and_free(store: Store) -> None:
    assert claim(store, "a", at_most=2.0) is Claim.MINE
    store.release()
    assert [attempt.unknown for _, _, attempt in store.attempts()] == [2.0]
    assert claim(store, "a") is Claim.MINE


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.sqlite"
    path.write_text("not a database " * 100)
    with pytest.raises(ValueError, match="expected a store of `collect`"):
        Store(path)
    assert path.read_text().startswith("not a database")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="unable to open"):
        Store(tmp_path / "s.sqlite")
