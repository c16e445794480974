"""What metrics and weights read of a pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from compact_ops.linear_token_stats import STATISTICS


@dataclass(frozen=True)
class Needs:
    """What a metric, a policy or a weigher reads; who runs the pass provides it.

    Attributes:
        student: its hidden states and token statistics. Without them the data alone decide, so
            weights can be had before the student runs (`Pass.before`).
        leaves: `Pass.leaf_logp`: the batch is built with answer leaves.
        leaf_hidden: `Pass.leaf_hidden` too. Leaves kept from an earlier step do not suffice, so the
            trainer refuses it with leaf_every > 1.
        options: `Pass.option_logp`: problems are encoded, and the batch is built, with option
            leaves. The trainer refuses it with leaf_every > 1.
        padded: the padded layout, one row per rationale, as in the public training code.
        judgements: `EncodedRationale.judgement`.
        gold: gold answers. Data in which no problem has one are refused.
        statistics: the optional statistics of `compact_ops.TokenStats` ("rank", "sum_p2",
            "margin"), in this order.
    """

    student: bool = True
    leaves: bool = False
    leaf_hidden: bool = False
    options: bool = False
    padded: bool = False
    judgements: bool = False
    gold: bool = False
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that what reads more of the student says that it reads the student.

        Raises:
            ValueError: it does not.
        """
        more = self.leaves or self.leaf_hidden or self.options or self.statistics
        if more and not self.student:
            raise ValueError(
                f"student must be True in {self}, which reads what the student computes"
            )

    @classmethod
    def of_all(cls, several: Iterable[Needs]) -> Needs:
        """Returns what several readers of one pass need together."""
        found = list(several)
        read = {name for needs in found for name in needs.statistics}
        together: dict[str, Any] = {
            field.name: any(getattr(needs, field.name) for needs in found) for field in fields(cls)
        }
        together["statistics"] = tuple(name for name in STATISTICS if name in read)
        return cls(**together)
