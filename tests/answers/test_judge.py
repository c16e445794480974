"""What counts as right is decided once, and a check that hangs or dies costs one item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from compact.answers import CheckerPool, Domain, Judge, Verdict, find_domain, register_domain
from compact.answers import pool as pool_module
from compact.answers.mathematics import check
from compact.answers.pool import Outcome


def items(rows: list[tuple[str, str]]) -> list[tuple[Domain, str, str]]:
    """Returns (domain, completion, gold) of (completion, gold)."""
    return [(find_domain(gold), completion, gold) for completion, gold in rows]


ROWS = [
    (r"Hence the answer is \frac{2}{4}.", r"\frac{1}{2}"),
    (r"So $\boxed{x^2+2x+1}$", "(x+1)^2"),
    (r"The answer is $3\sqrt{2}$.", r"\sqrt{18}"),
    (r"The answer is $3\sqrt{2}$.", r"\sqrt{17}"),
    ("The answer is (B)", "B"),
    ("nothing", "x+1"),
    ("290 / 2 = 145. The answer is 145", "145"),
    ("The answer is 13", "12"),
    ("I do not know", "12"),
    ("", "12"),
]


def test_judge_and_domains_give_the_same_verdicts() -> None:
    judge = Judge(timeout=30.0)
    try:
        verdicts = judge.judge(items(ROWS))
    finally:
        judge.close()
    assert [v.correct for v in verdicts] == [True] * 3 + [False, True, False, True] + [False] * 3
    assert {v.note for v in verdicts} == {""}
    assert verdicts[-1].predicted is None
    assert [d.matches(d.extract(c), g) for d, c, g in items(ROWS)] == [v.correct for v in verdicts]


def test_a_real_hang_costs_one_item() -> None:
    judge = Judge(timeout=3.0)
    try:
        verdicts = judge.judge(
            items(
                [
                    ("The answer is $9^{9^{9^9}}$", "2^{9^{9^9}}"),  # math-verify computes it
                    (r"The answer is $3\sqrt{2}$.", r"\sqrt{18}"),
                ]
            )
        )
    finally:
        judge.close()
    assert [(v.correct, v.note) for v in verdicts] == [(False, "timeout"), (True, "")]


def check_hostile(a: str, b: str) -> bool:
    """Hangs and ignores signals, exits, raises or answers, as `a` says."""
    if a == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if a == "die":
        os._exit(3)
    if a == "raise":
        raise ZeroDivisionError("no such number")
    return a == b


def test_pool_survives_hanging_dying_and_raising_checkers() -> None:
    pool = CheckerPool(check_hostile, processes=2, timeout=1.0)
    processes = [worker.process for worker in pool.workers]
    try:
        told = ["1", "hang", "2", "die", "3", "raise", "hang", "4"]
        start = time.monotonic()
        outcomes = pool([(x, x) for x in told])
        elapsed = time.monotonic() - start
        again = pool([("5", "5"), ("5", "6")])
        processes += [worker.process for worker in pool.workers]
        while not all(worker.ready for worker in pool.workers):
            pool([("5", "5")] * 4)
        for worker in pool.workers:  # died while idle
            worker.process.kill()
            worker.process.wait()
        died = pool([("7", "7"), ("8", "8"), ("9", "9")])
    finally:
        pool.close()
    notes = ["", "timeout", "", "checker died", ""]
    notes += ["ZeroDivisionError: no such number", "timeout", ""]
    assert [o.note for o in outcomes] == notes
    assert [o.correct for o in outcomes] == [n == "" for n in notes]
    assert again == [Outcome(True), Outcome(False)]
    assert died == [Outcome(True)] * 3, "the pair of a dead process is given to a new one"
    assert elapsed < 100, "two hangs of one second each, and new processes, took far too long"
    assert all(process.poll() is not None for process in processes)


def test_a_check_of_the_main_script_is_refused() -> None:
    with pytest.raises(ValueError, match="check: expected a top-level function"):
        CheckerPool(lambda a, b: True)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"processes": 0}])
def test_judge_refuses_settings_without_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected .* found 0"):
        Judge(**settings)  # type: ignore[arg-type]


def test_matches_outside_the_main_thread() -> None:
    domain = find_domain(r"\sqrt{2}")
    found: list[bool] = []
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{12}", r"2\sqrt{2}")]
    threads = [
        threading.Thread(target=lambda p=pair: found.append(domain.matches(*p))) for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, True]


def test_a_hang_in_matches_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    pool_module._close_shared()
    monkeypatch.setattr(pool_module, "_shared", CheckerPool(check, timeout=2.0))
    domain = find_domain("2^{9^{9^9}}")
    start = time.monotonic()
    assert not domain.matches("9^{9^{9^9}}", "2^{9^{9^9}}")
    assert not domain.matches("9^{9^{9^9}}", "2^{9^{9^9}}")  # not asked a second time
    assert time.monotonic() - start < 60
    pool_module._close_shared()


def check_once(a: str, b: str) -> bool:
    """Ends its process until the file `a` exists, which the test makes; then accepts."""
    if not Path(a).exists():
        os._exit(3)
    return True


def test_a_process_that_died_is_no_verdict_for_good(tmp_path: Path) -> None:
    """The pool tries a pair twice; a pair that failed is checked again when it is asked again."""
    path = tmp_path / "now"
    assert not pool_module.checked_apart(check_once, str(path), "")
    path.touch()
    assert pool_module.checked_apart(check_once, str(path), "")
    pool_module._close_shared()


def test_an_idle_process_that_was_killed_costs_nothing() -> None:
    pool_module._close_shared()
    domain = find_domain(r"\sqrt{2}")
    assert domain.matches(r"\sqrt{50}/5", r"\sqrt{2}")
    assert pool_module._shared is not None
    worker = pool_module._shared.workers[0]
    worker.process.kill()
    worker.process.wait()
    assert domain.matches(r"\sqrt{72}/6", r"\sqrt{2}")
    pool_module._close_shared()


def test_no_process_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(RuntimeError, match="answer checker could not start a process"):
        CheckerPool(check_hostile)


SCRIPT = """
import multiprocessing, sys, threading
print("run")
from compact.answers import find_domain
domain = find_domain(r"\\sqrt{2}")
assert domain.matches(r"\\sqrt{8}/2", r"\\sqrt{2}")
def child(queue):
    queue.put(domain.matches(r"\\sqrt{18}/3", r"\\sqrt{2}"))
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,), daemon=True)
process.start()
assert queue.get(timeout=60)
process.join()
assert domain.matches(r"\\sqrt{32}/4", r"\\sqrt{2}")
print("done")
"""


def test_a_script_without_a_guard_and_its_forked_daemon(tmp_path: Path) -> None:
    """The checker process does not run the user's script again; a child starts its own."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["run", "done"], done.stderr


@dataclass(frozen=True)
class Colour(Domain):
    """A domain of a user."""

    @classmethod
    def recognise(cls, gold: str | None, prompt: str) -> Colour | None:
        return cls() if gold in ("red", "rouge") else None

    def normalise(self, answer: str) -> str:
        return {"rouge": "red"}.get(answer.strip().lower(), answer)

    def extract(self, completion: str) -> str | None:
        return self.normalise(completion.split()[-1]) if completion.split() else None


@pytest.mark.usefixtures("own_registries")
def test_a_domain_of_a_user_is_judged() -> None:
    register_domain("colour")(Colour)
    domain = find_domain("red")
    assert isinstance(domain, Colour)
    judge = Judge()
    verdicts = judge.judge([(domain, "c'est rouge", "red"), (domain, "", "red")])
    judge.close()
    assert verdicts == [Verdict("red", True), Verdict(None, False)]


def test_nothing_here_imports_torch() -> None:
    code = "import sys, compact.answers; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stderr
