"""The sparse gradient product: grad @ weight, small entries of grad rounded at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_autograd, register_fake

_OP = "filtered_matmul"


def filtered_matmul(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The product grad @ weight with every |grad| < eps rounded to 0 or +-eps without bias.

    The gradient of a softmax row is nearly all zeros for a trained student. Time grows with the
    number of entries that are not 0 after the rounding: those from eps on, and about the sum of the
    others over eps. The rounding is stochastic, with a hash of the entry and its column for chance:
    the same input gives the same output. The error of row r has mean 0, is at most
    eps * sum_v |weight[v]|, and its expected square is at most
    eps * sum_v |grad[r, v]| |weight[v]|^2, both sums over |grad[r, v]| < eps. (Leaving the small
    entries out instead has an error in one direction, which adds up over rows and steps.)

    Args:
        grad: [R, V] gradient with respect to logits.
        weight: [V, H] the head.
        eps: threshold, >= 0; 0 is exact.

    Returns:
        [R, H] float32 (float64 for float64 `grad`). Differentiable in both: in `weight` as the
        product of what was used, in `grad` as the plain product, which it is in the mean.

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
    d_grad = d_weight = None
    with torch.autocast(upstream.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            d_grad = (upstream @ weight.T.to(upstream.dtype)).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            used = reference.rounded_at_random(grad.to(upstream.dtype), ctx.eps)
            d_weight = (used.T @ upstream).to(weight.dtype)
    return d_grad, d_weight, None


register_autograd("compact::filtered_matmul", _backward, _setup_context)
