"""The sparse gradient product: grad @ weight where small entries of grad are skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_autograd, register_fake

_OP = "filtered_matmul"


def filtered_matmul(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The product grad @ weight with every |grad| < eps taken as 0.

    The gradient of a softmax row is nearly all zeros for a trained student. Time grows with the
    number of entries used. The error of row r is at most the sum of |grad[r, v]| |weight[v]| over
    those skipped.

    Args:
        grad: [R, V] gradient with respect to logits.
        weight: [V, H] the head.
        eps: threshold, >= 0; 0 is exact.

    Returns:
        [R, H] float32 (float64 for float64 `grad`). Differentiable in both, as the product of what
        was used.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check.tensor(_OP, "grad", grad, _check.FLOATS, ["R", "V"])
    _check.tensor(_OP, "weight", weight, _check.FLOATS, ["V", "H"], V=grad.shape[1])
    _check.number(_OP, "eps", eps, 0, inclusive=True)
    _check.same_device(_OP, grad=grad, weight=weight)
    if backend() == "reference":
        return reference.filtered_matmul(grad, weight, eps)
    out: Tensor = torch.ops.compact.filtered_matmul(grad, weight, eps)
    return out


def _fake(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]), dtype=_check.compute_dtype(grad))


register_fake("compact::filtered_matmul", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, ctx.eps = inputs
    ctx.save_for_backward(grad, weight)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    grad, weight = ctx.saved_tensors
    used = grad.abs() >= ctx.eps
    d_grad = d_weight = None
    with torch.autocast(upstream.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            d_grad = torch.where(used, upstream @ weight.T.to(upstream.dtype), 0).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            kept = torch.where(used, grad, 0).to(upstream.dtype)
            d_weight = (kept.T @ upstream).to(weight.dtype)
    return d_grad, d_weight, None


register_autograd("compact::filtered_matmul", _backward, _setup_context)
