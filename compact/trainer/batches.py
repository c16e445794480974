"""Which problems make up a micro-batch of a rank: the same step for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from compact.passes import EncodedProblem


class Item(NamedTuple):
    """A problem of a micro-batch; one that is not counted only fills up the last round of ranks."""

    problem: EncodedProblem
    counted: bool


class ProblemDataset(Dataset[Item]):
    """Encoded problems. Index -1 - i gives problem i, not counted."""

    def __init__(self, problems: Sequence[EncodedProblem]) -> None:
        self.problems = tuple(problems)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Item:
        return Item(self.problems[index if index >= 0 else -1 - index], index >= 0)


class ProblemBatches(Sampler[list[int]]):
    """The micro-batches of one rank.

    Consecutive problems of one order, which depends on seed and epoch alone, go to (micro-batch,
    rank, place) in that sequence, so a step of world x accumulation x batch problems is the same
    set however the product is made up. Every rank gets the same number of micro-batches; a rank
    that has no problem left in the last one gets a problem that is not counted.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        """Args: number of problems; problems a micro-batch; seed None keeps the problems' order."""
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        a_round = self.batch_size * self.world
        return self.count // a_round if self.drop_last else -(-self.count // a_round)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        for micro in range(len(self)):
            first = (micro * self.world + self.rank) * self.batch_size
            mine = order[first : first + self.batch_size]
            yield mine or [-1 - order[first % self.count]]


class ProblemLoader(DataLoader[Item]):
    """Loads micro-batches as lists of items; the trainer packs them when it knows the step."""

    dataset: ProblemDataset

    def __init__(self, dataset: ProblemDataset, batches: ProblemBatches) -> None:
        # A generator of its own: a loader must not draw from the random state that dropout uses,
        # or a resumed run would no longer be the run it continues.
        generator = torch.Generator()
        super().__init__(dataset, batch_sampler=batches, collate_fn=list, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
