"""Judges from texts alone which rationales are right, and says why: no student, no torch.

`judge` reads all problems of the data at once, because how much a piece of evidence says is itself
measured on the data: `votes` learns how often each teacher is right, `checks` how often a check
fires. docs/method.md explains the result with a worked problem.
"""

from compact.validity.cases import Case, Solution
from compact.validity.judge import LEAST, Finding, Judge, Judgement, judge

__all__ = ["LEAST", "Case", "Finding", "Judge", "Judgement", "Solution", "judge"]
