"""Attention in trees: rationales that share a prompt, each blind to the others. On the CPU."""

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

_OP = "tree_attention"


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention of rows that are cut into parts.

    A token sees the prefix of its part, and of the part itself the tokens before it and itself:
    out = sum_j softmax_j(scale * query . key_j) value_j over those j. A mask over the whole row
    would pay for every pair; here the pairs of different parts are never computed, no key is
    repeated for the query heads that share it, and for the backward stay the inputs, the output
    and one number a query. CUDA has FlexAttention for that.

    Args:
        query: [B, L, Hq, D] on the CPU, Hq a multiple of Hk; head h reads key head h // (Hq / Hk).
        key: [B, L, Hk, D].
        value: [B, L, Hk, D].
        parts: [N, 5] int32 or int64, a row each: (b, begin, end, prefix_begin, prefix_end), token
            spans in row b, end exclusive. Parts do not overlap; an empty prefix is none.
        scale: None for D ** -0.5.

    Returns:
        [B, L, Hq, D] in query's dtype, zeros where a token is in no part. Differentiable in query,
        key and value.

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
    _check.tensor(_OP, "parts", parts, _check.INTS, ["N", 5])
    _check.same_device(_OP, query=query, key=key, value=value, parts=parts)
    if query.is_cuda:
        raise ValueError(f"{_OP}: query must be on the CPU, got {query.device}; see FlexAttention")
    if scale is None:
        scale = depth**-0.5
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
