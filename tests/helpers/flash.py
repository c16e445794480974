"""Torch's flash attention for CPUs in place of that for GPUs, one sequence at a time.

Its backward takes the result and the log-sum-exp from outside, as that of the GPU does. So it shows
whether a merge of several calls is right.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from compact_ops import flash_tree
from compact_ops.flash_tree import Sequences

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def stand_in(patch: pytest.MonkeyPatch) -> list[Sequences]:
    """Patches the two calls; returns a list that each forward call adds to."""
    calls: list[Sequences] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, of: Sequences, scale: float) -> Any:
        calls.append(of)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for at, keys in _spans(of):
            found = _FORWARD(*_heads(q[at], k[keys], v[keys]), is_causal=of.causal, scale=scale)
            out[at], lse[:, at] = found[0][0].transpose(0, 1), found[1].reshape(lse[:, at].shape)
        return out, lse

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, of: Sequences,
        scale: float,
    ) -> Any:  # fmt: skip
        found = [torch.zeros_like(t) for t in (q, k, v)]
        for at, keys in _spans(of):
            heads = _heads(q[at], k[keys], v[keys])
            g, o = (t[at].transpose(0, 1)[None] for t in (grad, out))
            parts = _BACKWARD(g, *heads, o, lse[None, :, at], 0.0, of.causal, scale=scale)
            for total, place, part in zip(found, (at, keys, keys), parts, strict=True):
                rows = part[0].transpose(0, 1)
                total[place] += rows.unflatten(1, (total.shape[1], -1)).sum(2)
        return tuple(found)

    patch.setattr(flash_tree, "_flash_forward", forward)
    patch.setattr(flash_tree, "_flash_backward", backward)
    return calls


def _spans(of: Sequences) -> Iterator[tuple[slice, slice]]:
    for at, keys in zip(pairwise(of.queries.tolist()), pairwise(of.keys.tolist()), strict=True):
        yield slice(*at), slice(*keys)


def _heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Returns [1, Hq, T, D] each; a head of keys is repeated for the queries that share it."""
    shared = q.shape[1] // k.shape[1]
    return [
        t.repeat_interleave(n, 1).transpose(0, 1)[None]
        for t, n in ((q, 1), (k, shared), (v, shared))
    ]
