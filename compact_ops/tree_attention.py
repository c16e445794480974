"""Attention for the tree layout: rationales share a prompt but do not see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import (
    backend,
    register_autograd,
    register_fake,
    register_once_differentiable,
)
from compact_ops.flash_tree import TreeTables, flash_supports, flash_tree_attention

_OP = "tree_attention"


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor | TreeTables,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of rows that are divided into parts.

    A token sees the prefix of its part, and the tokens of the part up to and including itself:
    out = sum_j softmax_j(scale * query . key_j) value_j over those j. Pairs of different parts are
    never computed, while a mask over the whole row would compute every pair. Keys are not repeated
    for the query heads that share them. For the backward it keeps the inputs, the output and one
    number per query.

    On CUDA it merges two calls of torch's flash attention (`compact_ops.flash_tree`), for float16
    and bfloat16 with D a multiple of 8 up to 256, on GPUs from Ampere on. Use FlexAttention for
    anything else.

    Args:
        query: [B, L, Hq, D], Hq a multiple of Hk; head h reads key head h // (Hq / Hk).
        key: [B, L, Hk, D].
        value: [B, L, Hk, D].
        parts: [N, 5] int32 or int64; row n is (b, begin, end, prefix_begin, prefix_end), token
            spans in row b, end exclusive. Parts do not overlap. An empty span means no prefix.
            Or `TreeTables.of(parts, B, L)` on query's device. On CUDA, every call makes them from
            a tensor, which waits for the device.
        scale: factor of the products; None for D ** -0.5.

    Returns:
        [B, L, Hq, D] in query's dtype; tokens in no part get zeros. Differentiable in query, key
        and value.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or device.
        RuntimeError: a part is out of range or overlaps another.
    """
    _check.tensor(_OP, "query", query, _check.FLOATS, ["B", "L", "Hq", "D"])
    rows, length, heads, depth = query.shape
    sizes = {"B": rows, "L": length, "D": depth}
    _check.tensor(_OP, "key", key, (query.dtype,), ["B", "L", "Hk", "D"], **sizes)
    _check.tensor(
        _OP, "value", value, (query.dtype,), ["B", "L", "Hk", "D"], **sizes, Hk=key.shape[2]
    )
    if depth == 0:
        raise ValueError(f"{_OP}: query must have D of at least 1, got {list(query.shape)}")
    if key.shape[2] == 0:
        raise ValueError(f"{_OP}: key must have at least one head, got {list(key.shape)}")
    if heads % key.shape[2]:
        raise ValueError(
            f"{_OP}: query must have a multiple of the {key.shape[2]} heads of key, got {heads}"
        )
    if scale is None:
        scale = depth**-0.5
    _check.number(_OP, "scale", scale)
    if query.is_cuda and not flash_supports(query.device, query.dtype, depth):
        raise ValueError(
            f"{_OP}: query on CUDA must be float16 or bfloat16 with D a multiple of 8 up to 256, "
            f"on a GPU from Ampere on, got {query.dtype} with D = {depth}; use FlexAttention"
        )
    if isinstance(parts, TreeTables):
        _check.together(_OP, query=query, key=key, value=value, parts=parts.queries)
        if parts.tokens != rows * length:
            raise ValueError(
                f"{_OP}: parts must be tables of B * L = {rows * length} tokens, got {parts.tokens}"
            )
        return flash_tree_attention(query, key, value, parts, scale)
    _check.tensor(_OP, "parts", parts, _check.INTS, ["N", 5])
    _check.together(_OP, query=query, key=key, value=value, parts=parts)
    if query.is_cuda:
        tables = TreeTables.of(parts.cpu(), rows, length).to(query.device)
        return flash_tree_attention(query, key, value, tables, scale)
    if backend() == "reference":
        return reference.tree_attention(query, key, value, parts, scale)
    out: Tensor = torch.ops.compact.tree_attention(query, key, value, parts.long(), scale)[0]
    return out.to(query.dtype)


def _fake(
    query: Tensor, key: Tensor, value: Tensor, parts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = _check.compute_dtype(query)
    out = query.new_empty(query.shape, dtype=dtype)
    return out, query.new_empty(query.shape[:3], dtype=dtype)


register_fake("compact::tree_attention", _fake)


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(query)
    d_query, d_key, d_value = (t.new_empty(t.shape, dtype=dtype) for t in (query, key, value))
    return d_query, d_key, d_value


register_fake("compact::tree_attention_backward", _backward_fake)
register_once_differentiable("compact::tree_attention_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, parts, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, parts, *output)


def _backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Any, ...]:
    query, *rest = ctx.saved_tensors
    grads = torch.ops.compact.tree_attention_backward(grad, query, *rest, ctx.scale)
    return (*(g.to(query.dtype) for g in grads), None, None)


register_autograd("compact::tree_attention", _backward, _setup_context)
