"""The sparse gradient product: grad @ weight with small entries of grad rounded at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_autograd, register_fake

_OP = "filtered_matmul"


def filtered_matmul(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns grad @ weight, with every |grad| < eps rounded to 0 or +-eps without bias.

    For a trained student, nearly all entries of the gradient of a softmax row are close to 0. The
    time grows with the number of entries that are not 0 after the rounding: the entries of at least
    eps, and about (sum of the other |entries|) / eps of the others. The rounding is stochastic. Its
    random number is a hash of the entry and its column, so the same input gives the same output.

    The error of row r has mean 0. It is at most eps * sum_v |weight[v]|. Its expected square is at
    most eps * sum_v |grad[r, v]| |weight[v]|^2. Both sums are over the v with |grad[r, v]| < eps.
    (Setting the small entries to 0 instead gives an error in one direction, which adds up over rows
    and steps.)

    Args:
        grad: [R, V] gradient with respect to logits.
        weight: [V, H] the head.
        eps: threshold, >= 0; with 0 the product is exact.

    Returns:
        [R, H] float32 (float64 for float64 `grad`). Differentiable in both arguments. The gradient
        of `weight` uses the rounded grad. The gradient of `grad` is that of the exact product,
        which is the mean of the rounded one.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check.tensor(_OP, "grad", grad, _check.FLOATS, ["R", "V"])
    _check.tensor(_OP, "weight", weight, _check.FLOATS, ["V", "H"], V=grad.shape[1])
    _check.number(_OP, "eps", eps, 0, inclusive=True)
    _check.together(_OP, grad=grad, weight=weight)
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
