"""Assigns problems to micro-batches and ranks, so that steps do not depend on the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from compact.passes import Batch, EncodedProblem
from compact.passes.encode import leave_unread, with_leaf_steps
from compact.passes.lazily import LazyProblems
from compact.settings import LEAF_BUDGET
from compact.weighting import Skips


class Item(NamedTuple):
    """A problem of a micro-batch. One that is not counted fills a place that would be empty."""

    problem: EncodedProblem
    counted: bool


class ProblemDataset(Dataset[Item]):
    """Encoded problems. Index -1 - i returns problem i as an item that is not counted.

    Skipped rationales are not in it, nor are problems of which every rationale is skipped. (In data
    that are encoded when they are needed, such a problem keeps one rationale, of weight 0.)

    Attributes:
        problems: the problems, with all of their rationales.
        padded: whether rows are padded, in which an answer leaf costs more (`with_leaf_steps`).
    """

    padded = False

    def __init__(
        self,
        problems: LazyProblems,
        skips: Skips | None = None,
        leaf_budget: float = LEAF_BUDGET,
    ) -> None:
        """Sets up the data.

        Args:
            problems: the problems.
            skips: which rationales of a problem are not read; None: all are read.
            leaf_budget: as in `encode_problem`.
        """
        self.problems, self._skips, self._leaf_budget = problems, skips, leaf_budget
        self._used: Sequence[int] = range(len(problems))
        if skips is not None and len(problems.sample) == len(problems):
            self._used = [i for i, p in enumerate(problems) if not all(skips(p))]

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, index: int) -> Item:
        place = self._used[index if index >= 0 else -1 - index]
        return Item(self.read(self.problems[place]), index >= 0)

    def read(self, problem: EncodedProblem) -> EncodedProblem:
        """Returns a problem without the rationales that are skipped."""
        if self._skips is not None:
            problem = leave_unread(problem, self._skips(problem), self._leaf_budget)
        return with_leaf_steps(problem, self._leaf_budget, padded=True) if self.padded else problem


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
        accumulation: int = 1,
        data_step: Callable[[int], int] | None = None,
    ) -> None:
        """Sets up the batches of epoch 0.

        Args:
            count: number of problems.
            batch_size: problems per micro-batch and rank.
            rank: this rank, from 0.
            world: number of ranks.
            seed: seed of the order; None keeps the order of the problems.
            drop_last: whether to drop the last micro-batch if some place in it would be empty.
            accumulation: micro-batches per optimizer step.
            data_step: the number of an optimizer step -> the number of the step whose problems it
                trains on, both from 0; None: the same. See `Strategy.data_step`.

        Raises:
            ValueError: with `data_step`, the micro-batches of an epoch are not whole steps.
        """
        self.accumulation, self.data_step = accumulation, data_step
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0
        if data_step is not None and len(self) % accumulation:
            raise ValueError(
                "gradient_accumulation_steps must divide the micro-batches of an epoch with this "
                f"strategy, which trains on the same steps several times, got {accumulation} for "
                f"{len(self)} micro-batches"
            )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the problems."""
        self.epoch = epoch

    def __len__(self) -> int:
        a_round = self.batch_size * self.world
        return self.count // a_round if self.drop_last else -(-self.count // a_round)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for micro in range(len(self)):
            epoch, place = self._source(micro)
            if epoch not in orders:
                orders = {epoch: self._order(epoch)}
            order = orders[epoch]
            first = (place * self.world + self.rank) * self.batch_size
            mine = order[first : first + self.batch_size]
            yield mine or [-1 - order[first % self.count]]

    def _order(self, epoch: int) -> list[int]:
        """Returns the order of the problems in an epoch."""
        if self.seed is None:
            return list(range(self.count))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator).tolist()

    def _source(self, micro: int) -> tuple[int, int]:
        """Returns the epoch and place in it of the problems of a micro-batch of this epoch."""
        if self.data_step is None:
            return self.epoch, micro
        steps = len(self) // self.accumulation
        step, part = divmod(micro, self.accumulation)
        epoch, place = divmod(self.data_step(self.epoch * steps + step), steps)
        return epoch, place * self.accumulation + part


def asks_leaves(problems: Iterable[EncodedProblem]) -> bool:
    """Returns whether some problem has a gold answer for answer leaves to ask for."""
    return any(problem.gold_ids for problem in problems)


class MicroBatch(list[Item]):
    """The items of a micro-batch.

    Attributes:
        batch: their tensors on the CPU, if they were built ahead; else None.
    """

    batch: Batch | None = None


@dataclass(frozen=True)
class Collate:
    """Makes micro-batches, in the workers of the loader if it has any.

    Attributes:
        build: builds the tensors of problems, given whether it builds answer leaves; None if they
            depend on the step, so that they must be built when it runs.
        leaves: whether answer leaves are built where a problem has a gold answer.
    """

    build: Callable[..., Batch] | None
    leaves: bool

    def __call__(self, items: Sequence[Item]) -> MicroBatch:
        """Returns the micro-batch of these items."""
        micro = MicroBatch(items)
        if self.build is not None:
            problems = [item.problem for item in items]
            built = self.build(problems, leaves=self.leaves and asks_leaves(problems))
            # Each storage that a worker sends takes a file descriptor of the main process.
            micro.batch = built if get_worker_info() is None else built.in_one_buffer()
        return micro


class ProblemLoader(DataLoader[Item]):
    """Loads micro-batches."""

    dataset: ProblemDataset

    def __init__(
        self, dataset: ProblemDataset, batches: ProblemBatches, collate: Collate, **settings: Any
    ) -> None:
        """Sets up the loader; `settings` are those of DataLoader for its worker processes."""
        # Its own generator: if the loader used the global random state, as dropout does, a resumed
        # run would differ from one that was not interrupted.
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            generator=torch.Generator(),
            **settings,
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which determines the order of the problems."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
