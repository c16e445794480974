"""Tree attention on a GPU: two calls of torch's flash attention, merged by log-sum-exp.

The first call attends within each part, causally. The second attends from the tokens that have a
prefix to all of that prefix. The result is a weighted mean of the two: a call's weight is the
exponential of its log-sum-exp less that of both. The backward of flash attention computes each
probability again from the log-sum-exp, so each call gets the merged result and log-sum-exp and
returns its own part of the gradients. Ring attention (Liu et al. 2023, arXiv 2310.01889) merges the
blocks of several devices in the same way.

No mask is built, so memory is linear in the length of a row. The sequences of a call lie one after
the other without gaps, so tokens in no part (padding) are sequences too: they attend to each other,
and their results are set to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact_ops import _check

_OP = "tree_attention"
DTYPES = (torch.float16, torch.bfloat16)
"""The dtypes that flash attention computes with."""
MAX_DEPTH, DEPTH_MULTIPLE = 256, 8


class Sequences(NamedTuple):
    """What one call of flash attention attends: sequence i of queries to sequence i of keys.

    Attributes:
        queries, keys: [S + 1] int32 offsets of the sequences.
        longest_query, longest_key: tokens of the longest one.
        causal: whether a query sees only the keys up to its own place.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    causal: bool


class TreeTables(NamedTuple):
    """The parts of rows [B, L] as flash attention reads them; tokens are indices into B * L.

    Attributes:
        within: the first call: each part, and each span in no part.
        to_prefix: the second call: the tokens `queries` and `keys`, a sequence for each prefix.
        queries: [N] int64, the tokens whose part has a prefix, ordered by that prefix.
        keys: [M] int64, the tokens of each prefix.
        outside: [U] int64, the tokens in no part.
        tokens: B * L.
    """

    within: Sequences
    to_prefix: Sequences
    queries: Tensor
    keys: Tensor
    outside: Tensor
    tokens: int

    @classmethod
    def of(cls, parts: Tensor, rows: int, length: int) -> TreeTables:
        """Returns the tables of `parts`, on the CPU.

        Args:
            parts: [N, 5] integers on the CPU, as for `compact_ops.tree_attention`.
            rows: B.
            length: L.

        Raises:
            TypeError: `parts` is no tensor of integers.
            ValueError: `parts` has the wrong shape.
            RuntimeError: a part is out of range or overlaps another.
        """
        _check.tensor(_OP, "parts", parts, _check.INTS, ["N", 5])
        spans: list[tuple[int, int, int]] = []
        users: dict[tuple[int, int], list[int]] = {}  # a prefix -> the tokens that see it
        for n, (row, begin, end, first, last) in enumerate(parts.tolist()):
            if not 0 <= row < rows:
                raise RuntimeError(f"{_OP}: parts[{n}, 0] must be a row in [0, {rows}), got {row}")
            if not 0 <= begin < end <= length:
                raise RuntimeError(
                    f"{_OP}: parts[{n}, 1:3] must be a span of at least one token in "
                    f"[0, {length}], got {begin} to {end}"
                )
            if not 0 <= first <= last <= length or max(first, begin) < min(last, end):
                raise RuntimeError(
                    f"{_OP}: parts[{n}, 3:5] must be a span in [0, {length}] outside of the part, "
                    f"got {first} to {last}"
                )
            at = row * length
            spans.append((at + begin, at + end, n))
            if first < last:
                users.setdefault((at + first, at + last), []).extend(range(at + begin, at + end))
        edges, outside = [0], list[int]()
        for begin, end, n in [*sorted(spans), (rows * length, rows * length, -1)]:
            if begin < edges[-1]:
                raise RuntimeError(
                    f"{_OP}: parts[{n}] must not overlap another part, got token "
                    f"{begin % length} twice"
                )
            outside += range(edges[-1], begin)
            edges += [edge for edge in dict.fromkeys((begin, end)) if edge > edges[-1]]
        own, longest = _int32(edges), max((b - a for a, b in pairwise(edges)), default=0)
        counts = [len(tokens) for tokens in users.values()]
        sizes = [last - first for first, last in users]
        return cls(
            Sequences(own, own, longest, longest, causal=True),
            Sequences(
                _int32([0, *accumulate(counts)]),
                _int32([0, *accumulate(sizes)]),
                max(counts, default=0),
                max(sizes, default=0),
                causal=False,
            ),
            queries=torch.tensor(
                [t for tokens in users.values() for t in tokens], dtype=torch.int64
            ),
            keys=torch.tensor([t for span in users for t in range(*span)], dtype=torch.int64),
            outside=torch.tensor(outside, dtype=torch.int64),
            tokens=rows * length,
        )

    def moved(self, move: Callable[[list[Tensor]], list[Tensor]]) -> TreeTables:
        """Returns the tables on a device; `move` takes their tensors there in one call."""
        own, query_offsets, key_offsets, queries, keys, outside = move(
            [
                self.within.keys,
                self.to_prefix.queries,
                self.to_prefix.keys,
                self.queries,
                self.keys,
                self.outside,
            ]
        )
        return TreeTables(
            self.within._replace(queries=own, keys=own),
            self.to_prefix._replace(queries=query_offsets, keys=key_offsets),
            queries,
            keys,
            outside,
            self.tokens,
        )

    def to(self, device: torch.device) -> TreeTables:
        """Returns the tables on `device`, each tensor in a copy of its own."""
        return self.moved(lambda tensors: [tensor.to(device) for tensor in tensors])


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@cache  # it is asked in every layer
def flash_supports(device: torch.device, dtype: torch.dtype, depth: int) -> bool:
    """Whether torch's flash attention runs for heads of this width: on GPUs from Ampere on."""
    return (
        dtype in DTYPES
        and depth <= MAX_DEPTH
        and depth % DEPTH_MULTIPLE == 0
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def flash_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, tables: TreeTables, scale: float
) -> Tensor:
    """As `compact_ops.tree_attention`, with tables on the device of the query."""
    if not query.numel():
        return query * 0
    out: Tensor = _FlashTree.apply(query, key, value, tables, scale)  # type: ignore[no-untyped-call]
    return out


class _FlashTree(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tables: TreeTables, scale: float
    ) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (query, key, value))
        out, lse = _flash_forward(q, k, v, tables.within, scale)
        at, keys = tables.queries, tables.keys
        if tables.to_prefix.longest_key:
            prefix, prefix_lse = _flash_forward(q[at], k[keys], v[keys], tables.to_prefix, scale)
            own_lse = lse[:, at]
            both = torch.logaddexp(own_lse, prefix_lse)
            merged = out[at] * _share(own_lse, both) + prefix * _share(prefix_lse, both)
            out.index_copy_(0, at, merged.to(out.dtype))
            lse.index_copy_(1, at, both)
        out.index_fill_(0, tables.outside, 0.0)
        ctx.tables, ctx.scale = tables, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        tables, scale = ctx.tables, ctx.scale
        g, q, k, v = (t.flatten(0, 1) for t in (grad.contiguous(), query, key, value))
        grads = _flash_backward(g, q, k, v, out, lse, tables.within, scale)
        for each in grads:  # tokens in no part attended to each other
            each.index_fill_(0, tables.outside, 0.0)
        at, keys = tables.queries, tables.keys
        if tables.to_prefix.longest_key:
            more = _flash_backward(
                *(g[at], q[at], k[keys], v[keys], out[at], lse[:, at].contiguous()),
                *(tables.to_prefix, scale),
            )
            for total, part, index in zip(grads, more, (at, keys, keys), strict=True):
                total.index_add_(0, index, part)
        return (
            *(d.view_as(t) for d, t in zip(grads, (query, key, value), strict=True)),
            None,
            None,
        )


def _share(lse: Tensor, both: Tensor) -> Tensor:
    """Returns [T, H, 1], the weight of one call's result: that of its keys in the softmax over all.

    Args:
        lse: [H, T] log-sum-exp over the keys of the call.
        both: [H, T] log-sum-exp over the keys of both calls.
    """
    return (lse - both).exp().t()[..., None]


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, of: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns attention [T, Hq, D] and log-sum-exp [Hq, T]."""
    if not q.is_cuda:
        raise ValueError(f"{_OP}: query must be on CUDA with tables, got {q.device}")
    offsets = (of.queries, of.keys, of.longest_query, of.longest_key)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, *offsets, 0.0, of.causal, False), scale=scale
    )
    return out, lse


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    of: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, from the result and log-sum-exp over all keys."""
    offsets = (of.queries, of.keys, of.longest_query, of.longest_key)
    no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(grad, q, k, v, out, lse, *offsets, 0.0, of.causal, no_seed, q.new_empty(0)),
        scale=scale,
    )
    return found
