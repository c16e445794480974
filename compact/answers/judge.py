"""Judges completions against gold answers, each in the answer domain of its problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compact.answers.base import Domain
from compact.answers.mathematics import Mathematics, check
from compact.answers.pool import TIMEOUT, CheckerPool


@dataclass(frozen=True)
class Verdict:
    """How one completion was judged.

    Attributes:
        predicted: the answer extracted from the completion, None if there is none.
        correct: whether it matches the gold answer.
        note: why an item could not be judged ("timeout", "checker died"); "" if it was judged.
    """

    predicted: str | None
    correct: bool
    note: str = ""


class Judge:
    """Judges completions by `Domain.extract` and `Domain.matches`.

    Mathematics that `Mathematics.decide` cannot decide is checked in separate processes, which are
    started when first needed.

    Args:
        timeout: most seconds for one item of mathematics.
        processes: items of mathematics that are checked at the same time.

    Raises:
        ValueError: `timeout` or `processes` is not positive.
    """

    def __init__(self, timeout: float = TIMEOUT, processes: int = 2) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout: expected seconds above 0, found {timeout}")
        if processes < 1:
            raise ValueError(f"processes: expected at least 1, found {processes}")
        self.timeout = timeout
        self.processes = processes
        self.pool: CheckerPool | None = None

    def judge(self, items: Sequence[tuple[Domain, str, str]]) -> list[Verdict]:
        """Returns the verdict of each (domain, completion, gold).

        Raises:
            RuntimeError: a checker process could not be started.
        """
        verdicts: list[Verdict] = []
        asked: dict[tuple[str, str], list[int]] = {}
        for i, (domain, completion, gold) in enumerate(items):
            predicted = domain.extract(completion)
            if isinstance(domain, Mathematics):
                decided = domain.decide(predicted, gold)
                if decided is None and predicted is not None:
                    pair = (domain.normalise(predicted), domain.normalise(gold))
                    asked.setdefault(pair, []).append(i)
                correct = bool(decided)
            else:
                correct = domain.matches(predicted, gold)
            verdicts.append(Verdict(predicted, correct))
        if asked:
            if self.pool is None:
                self.pool = CheckerPool(check, processes=self.processes, timeout=self.timeout)
            for where, outcome in zip(asked.values(), self.pool(list(asked)), strict=True):
                for i in where:
                    verdicts[i] = Verdict(verdicts[i].predicted, outcome.correct, outcome.note)
        return verdicts

    def close(self) -> None:
        """Ends the processes, if any were started."""
        if self.pool:
            self.pool.close()
            self.pool = None
