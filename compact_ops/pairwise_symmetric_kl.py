"""Symmetric Kullback-Leibler divergence of pairs of rows, block by block over the vocabulary."""

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

_OP = "pairwise_symmetric_kl"


def pairwise_symmetric_kl(
    hidden: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Returns KL(p || q) + KL(q || p) of p = softmax(z[left[i]]) and q = softmax(z[right[i]]).

    This is the consistency term of the method (docs/method.md). z is as in linear_token_stats. The
    logits of a row are computed once for all its pairs, and again in the backward. No [P, V] tensor
    is stored.

    Args:
        hidden: [N, H] hidden states.
        weight: [V, H] the head.
        left: [P] int32 or int64, rows of `hidden`; on its device or on the CPU. From a GPU they are
            copied to the CPU first, and the host waits for that.
        right: [P], like `left`.
        bias: [V] or None.
        softcap: c of c * tanh(x / c), or None.
        logit_scale: multiplies hidden @ weight.T.

    Returns:
        [P] float32 (float64 for float64 `hidden`), in nats; differentiable in hidden, weight and
        bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        RuntimeError: a row is out of range.
    """
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    _check.tensor(_OP, "left", left, _check.INTS, ["P"])
    _check.tensor(_OP, "right", right, _check.INTS, ["P"], P=left.shape[0])
    _check.together(_OP, hidden=hidden, weight=weight, bias=bias)
    for name, index in (("left", left), ("right", right)):
        if index.device.type not in ("cpu", hidden.device.type):
            allowed = " or ".join(dict.fromkeys((str(hidden.device), "cpu")))
            raise ValueError(f"{_OP}: {name} must be on {allowed}, got {index.device}")
    if backend() == "reference":
        return reference.pairwise_symmetric_kl(
            hidden, weight, left, right, bias=bias, softcap=softcap, logit_scale=logit_scale
        )
    left, right = (t.cpu() if t.is_cuda else t for t in (left.long(), right.long()))
    kl_left, kl_right, _, _ = torch.ops.compact.pairwise_symmetric_kl(
        hidden, weight, left, right, bias, softcap or 0.0, logit_scale
    )
    both: Tensor = kl_left + kl_right
    return both


def _fake(
    hidden: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    kl_left, kl_right, lse_left, lse_right = (
        hidden.new_empty(left.shape, dtype=dtype) for _ in range(4)
    )
    return kl_left, kl_right, lse_left, lse_right


register_fake("compact::pairwise_symmetric_kl", _fake)


def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    kl_left: Tensor,
    kl_right: Tensor,
    lse_left: Tensor,
    lse_right: Tensor,
    softcap: float,
    logit_scale: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty((rows if need_hidden else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_bias else 0,), dtype=dtype),
    )


register_fake("compact::pairwise_symmetric_kl_backward", _backward_fake)
register_once_differentiable("compact::pairwise_symmetric_kl_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, left, right, bias, *ctx.numbers = inputs
    ctx.save_for_backward(hidden, weight, left, right, bias, *output)


def _backward(
    ctx: Any, grad_left: Tensor, grad_right: Tensor, _left: Tensor, _right: Tensor
) -> tuple[Any, ...]:
    # The public function returns the sum of the two outputs, so both have the same gradient.
    hidden, weight, left, right, bias, *stats = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gradients = torch.ops.compact.pairwise_symmetric_kl_backward(
        grad_left, hidden, weight, left, right, bias, *stats, *ctx.numbers,
        needs[0], needs[1], needs[4],
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (
        g.to(t.dtype) if need else None
        for g, t, need in zip(gradients, (hidden, weight, bias), (needs[0], needs[1], needs[4]),
                              strict=True)
    )  # fmt: skip
    return d_hidden, d_weight, None, None, d_bias, None, None


register_autograd("compact::pairwise_symmetric_kl", _backward, _setup_context)
