"""Assigns problems to micro-batches and ranks, so that steps do not depend on the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from compact.passes import EncodedProblem


class Item(NamedTuple):
    """A problem of a micro-batch. One that is not counted fills a place that would be empty."""

    problem: EncodedProblem
    counted: bool


class ProblemDataset(Dataset[Item]):
    """Encoded problems. Index -1 - i returns problem i as an item that is not counted."""

    def __init__(self, problems: Sequence[EncodedProblem]) -> None:
        self.problems = tuple(problems)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Item:
        return Item(self.problems[index if index >= 0 else -1 - index], index >= 0)


class ProblemBatches(Sampler[list[int]]):
    """The micro-batches of one rank.

    The order of the problems depends only on seed and epoch. Consecutive problems fill the places
    of rank 0, then those of rank 1 and so on, then the next micro-batch. A step of (ranks x
    accumulation x batch size) problems is therefore the same set for any such factors of the same
    product. Every rank gets the same number of micro-batches. A rank without a problem in the last
    one gets a problem that is not counted.
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
        """Sets up the batches of epoch 0.

        Args:
            count: number of problems.
            batch_size: problems per micro-batch and rank.
            rank: this rank, from 0.
            world: number of ranks.
            seed: seed of the order; None keeps the order of the problems.
            drop_last: whether to drop the last micro-batch if some place in it would be empty.
        """
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the problems."""
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
    """Loads micro-batches as lists of items; `MicroBatchLoss` builds the tensors."""

    dataset: ProblemDataset

    def __init__(self, dataset: ProblemDataset, batches: ProblemBatches) -> None:
        # Its own generator: if the loader used the global random state, as dropout does, a resumed
        # run would differ from one that was not interrupted.
        generator = torch.Generator()
        super().__init__(dataset, batch_sampler=batches, collate_fn=list, generator=generator)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the problems."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
