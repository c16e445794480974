"""Named means, for a line of a log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence


class Means:
    """Named means of what was added since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds `count` values whose sum is `total`."""
        self._sums[name][0] += total
        self._sums[name][1] += count

    @property
    def sums(self) -> Mapping[str, Sequence[float]]:
        """Name -> (total, count), for `add` on another process."""
        return dict(self._sums)

    def take(self) -> dict[str, float]:
        """Returns the means, in the order of their first value, and clears them."""
        found = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        return found
