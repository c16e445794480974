"""Attention of trees on the CPU, branch by branch.

One mask over a row makes a CPU pay for every masked pair, and most pairs of a tree are masked:
tokens of different rationales. Here every prompt and rationale attends to itself, causally, and the
rationales of a problem attend to its prompt in one more call without a mask. The two results of a
rationale's token are softmaxes over different keys; their log-sum-exps say how much of the whole
each of them is. No key is copied or repeated, and of a layer only query, key, value, output and one
number a query stay for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact.passes import Batch

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tree(NamedTuple):
    """A problem in a row: its prompt and its rationales, which follow each other."""

    prompt: slice
    rationales: list[slice]

    def calls(self) -> Iterator[tuple[slice, slice, bool]]:
        """Queries, keys and whether causal, of each call; every query's first is its own part."""
        for part in (self.prompt, *self.rationales):
            yield part, part, True
        yield slice(self.rationales[0].start, self.rationales[-1].stop), self.prompt, False


def trees_of(batch: Batch) -> list[list[Tree]]:
    """The trees of each row [B] of a batch with layout "tree", in the order of its problems."""
    length = batch.input_ids.shape[1]
    rows: list[list[Tree]] = [[] for _ in batch.input_ids]
    offsets, problems = batch.token_offsets.tolist(), batch.problem_offsets.tolist()
    first_rows = batch.token_rows[batch.token_offsets[:-1]].tolist()
    for p, row in enumerate(batch.prompt_rows.tolist()):
        b, last = divmod(row, length)
        start = last - int(batch.position_ids[b, last])
        rationales = [
            slice(first_rows[r] % length, first_rows[r] % length + offsets[r + 1] - offsets[r])
            for r in range(problems[p], problems[p + 1])
        ]
        rows[b].append(Tree(slice(start, last + 1), rationales))
    return rows


def pairs(trees: list[list[Tree]]) -> int:
    """Pairs of query and key that `attend` computes a layer and head."""
    return sum(
        (queries.stop - queries.start) * (keys.stop - keys.start)
        for row in trees
        for tree in row
        for queries, keys, _ in tree.calls()
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, trees: list[list[Tree]], scaling: float | None
) -> Tensor:
    """Attention in which a token sees the prompt and what came before it in its rationale.

    Args:
        query: [B, heads, L, D] on the CPU.
        key: [B, key heads, L, D]; a head of it serves as many query heads as follow each other.
        value: like key.
        trees: of each row; padding is where none of them is.
        scaling: of the products of queries and keys; None for D^-1/2.

    Returns:
        [B, L, heads, D]; zeros at padding.
    """
    return _Attend.apply(query, key, value, trees, scaling)


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """A view [key heads, heads of each, L, D] of one row [heads, L, D]."""
    return x.unflatten(0, (key_heads, -1))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        trees: list[list[Tree]],
        scaling: float | None,
    ) -> Tensor:
        rows, heads, length, depth = query.shape
        out = query.new_zeros(rows, length, heads, depth)
        log_sums = []
        for b, row in enumerate(trees):
            q, k, v, o = _row(b, query, key, value, out.transpose(1, 2))
            log_sum = q.new_zeros(q.shape[:3], dtype=torch.float32 if q.itemsize < 8 else q.dtype)
            for tree in row:
                for queries, keys, causal in tree.calls():
                    mine, mass = o[:, :, queries], log_sum[:, :, queries]
                    more, its_mass = _FORWARD(
                        q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scaling
                    )
                    if causal:
                        mine.copy_(more)
                        mass.copy_(its_mass)
                    else:
                        share = torch.sigmoid(its_mass - mass).unsqueeze(-1).to(mine.dtype)
                        mine.lerp_(more, share)
                        mass.copy_(torch.logaddexp(mass, its_mass))
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.trees, ctx.scaling = trees, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *log_sums = ctx.saved_tensors
        by_token = [torch.zeros_like(t.transpose(1, 2)) for t in (query, key, value)]
        grads = [t.transpose(1, 2) for t in by_token]
        grad = grad.contiguous()
        for b, row in enumerate(ctx.trees):
            q, k, v, o = _row(b, query, key, value, out.transpose(1, 2))
            g = _grouped(grad[b].transpose(0, 1), len(k))
            grad_q, grad_k, grad_v = _grouped(grads[0][b], len(k)), grads[1][b], grads[2][b]
            for tree in row:
                for queries, keys, causal in tree.calls():
                    # Of its keys' share only: out and log-sum are those of all keys.
                    to_q, to_k, to_v = _BACKWARD(
                        g[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys],
                        o[:, :, queries], log_sums[b][:, :, queries], 0.0, causal,
                        scale=ctx.scaling,
                    )  # fmt: skip
                    grad_q[:, :, queries] += to_q
                    grad_k[:, keys] += to_k.sum(1)
                    grad_v[:, keys] += to_v.sum(1)
        return (*grads, None, None)


def _row(b: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """Row b as views [key heads, heads of each, L, D], keys and values standing for all of them."""
    heads, key_heads = query.shape[1], key.shape[1]
    q, o = _grouped(query[b], key_heads), _grouped(out[b], key_heads)
    k, v = (t[b].unsqueeze(1).expand(-1, heads // key_heads, -1, -1) for t in (key, value))
    return q, k, v, o
