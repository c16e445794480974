"""Checks the values of indices for the plain-torch reference; the kernels check them themselves.

All errors read as the kernels' do. torch.compile cannot trace such checks, so it skips them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact_ops.types import GoldAnswers


def index(
    op: str, name: str, value: Tensor, high: int, *, low: int = 0, also: int | None = None
) -> None:
    """Checks that every entry is in [low, high) or equal to `also`.

    Raises:
        RuntimeError: names the first entry that is not.
    """
    if torch.compiler.is_compiling():
        return
    wrong = (value < low) | (value >= high)
    if also is not None:
        wrong &= value != also
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"{op}: {name}[{', '.join(map(str, at))}] must be in [{low}, {high}), "
            f"got {value[tuple(at)].item()}"
        )


def offsets(op: str, name: str, value: Tensor, least: int) -> None:
    """Checks that value[i + 1] is at least value[i] + least, for least 0 or 1.

    Raises:
        RuntimeError: names the first entry that is not.
    """
    if torch.compiler.is_compiling():
        return
    short = value.diff() < least
    if short.any():
        at = int(short.nonzero()[0])
        before, found = value[at : at + 2].tolist()
        bound = ("at least", "larger than")[least]
        raise RuntimeError(
            f"{op}: {name}[{at + 1}] must be {bound} {name}[{at}] = {before}, got {found}"
        )


def gold(op: str, value: GoldAnswers, vocabulary: int) -> None:
    """Checks the values of gold answers.

    Raises:
        RuntimeError: names the entry that is out of range, or the token without an answer.
    """
    ids, bounds, problem = value
    index(op, "gold.ids", ids, vocabulary)
    index(op, "gold.offsets", bounds, len(ids) + 1)
    index(op, "gold.problem", problem, len(bounds) - 1)
    offsets(op, "gold.offsets", bounds, 0)
    if torch.compiler.is_compiling():
        return
    empty = (bounds[problem] == bounds[problem + 1]).nonzero()
    if len(empty):
        at = int(empty[0])
        raise RuntimeError(
            f"{op}: gold.problem[{at}] must be a problem with an answer, got {int(problem[at])}, "
            "which has none"
        )
