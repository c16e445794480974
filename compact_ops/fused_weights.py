"""The head's gradient mode "fused-weights": with known token weights, loss and gradients at once.

Rows are taken in chunks. A chunk's logits exist once: the row kernel turns them into the weighted
gradient G, and dH = G @ W and dW += G.T @ hidden follow. Three matrix products, and only the gradients
themselves stay. The backward multiplies them by one number, so it refuses an upstream vector of nll
that is not a multiple of the weights: the gradients would be wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_ops import _check

# Rows of logits that exist at a time: 256 x 49,152 float32 are 50 MB. Fewer make the products slower.
_CHUNK = 256
# Rounding in the loss around nll may tilt the upstream vector by this much, relative to its largest.
_TILT = 1e-4


def _fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    token_weight: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """The six statistics, then d_hidden [N, H], d_weight [V, H], d_bias [V] (0 rows if unneeded)."""
    dtype = _check.compute_dtype(hidden)
    head = weight.to(dtype)
    read = (hidden if rows is None else hidden[rows]).to(dtype)
    count, vocabulary = target.shape[0], weight.shape[0]
    d_read = read.new_empty((count if need_hidden else 0, weight.shape[1]))
    d_weight = read.new_zeros((vocabulary if need_weight else 0, weight.shape[1]))
    d_bias = read.new_zeros((vocabulary if need_bias else 0,))
    buffer = read.new_empty((min(_CHUNK, count), vocabulary))
    parts = []
    for begin in range(0, count, _CHUNK):
        some = slice(begin, min(begin + _CHUNK, count))
        logits = buffer[: some.stop - begin]
        torch.mm(read[some], head.T, out=logits)
        problem = None if gold_problem is None else gold_problem[some]
        parts.append(
            torch.ops.compact.row_stats_(
                logits, target[some], token_weight[some], gold_ids, gold_offsets, problem,
                bias, softcap, logit_scale, ignore_index,
            )
        )  # fmt: skip
        if need_hidden:
            torch.mm(logits, head, out=d_read[some])
        if need_weight:
            d_weight.addmm_(logits.T, read[some])
        if need_bias:
            d_bias += logits.sum(dim=0) / logit_scale
    stats = [torch.cat(column) for column in zip(*parts, strict=True)]
    if need_hidden and rows is not None:
        ones = d_read.new_ones((count,))
        d_read = torch.ops.compact.accumulate_weighted(d_read, rows, ones, None, hidden.shape[0])
    return *stats, d_read, d_weight, d_bias


def _fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    token_weight: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    dtype = _check.compute_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    gold = 0 if gold_ids is None else count
    sizes = [(count,)] * 4 + [(gold,)] * 2
    shapes: list[tuple[int, ...]] = [
        *sizes,
        (hidden.shape[0] if need_hidden else 0, width),
        (vocabulary if need_weight else 0, width),
        (vocabulary if need_bias else 0,),
    ]
    kinds = [torch.bool if i == 3 else dtype for i in range(len(shapes))]
    return tuple(hidden.new_empty(s, dtype=k) for s, k in zip(shapes, kinds, strict=True))


def _common_factor(grad: Tensor, token_weight: Tensor) -> Tensor:
    """The c [] of grad = c * token_weight.

    Raises:
        ValueError: there is none.
    """
    weight = token_weight.to(grad.dtype)
    factor = (grad * weight).sum() / weight.square().sum().clamp(min=torch.finfo(grad.dtype).tiny)
    if bool(((grad - factor * weight).abs() > _TILT * grad.abs().amax()).any()):
        raise ValueError(
            "linear_token_stats: with head_grad 'fused-weights' the loss must be a multiple of "
            "(token_weight * nll).sum(), got another gradient of nll"
        )
    return factor


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, *_ = inputs
    bias, token_weight, ignore_index = inputs[7], inputs[8], inputs[11]
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    live = torch.where(target == ignore_index, 0, token_weight)
    ctx.ignore = ignore_index
    ctx.save_for_backward(live, target, *output[6:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    live, target, d_hidden, d_weight, d_bias = ctx.saved_tensors
    # An ignored token has nll 0 whatever the weights, so its upstream gradient does not matter.
    seen = torch.where(target == ctx.ignore, 0, grad)
    factor = torch.ops.compact_fused.common_factor(seen, live)
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[7]
    found = [
        (factor * g).to(dtype) if need else None
        for g, need, dtype in zip((d_hidden, d_weight, d_bias), needs, ctx.dtypes, strict=True)
    ]
    return found[0], found[1], None, None, None, None, None, found[2], *(None,) * 7


fused_head = torch.library.custom_op(
    "compact_fused::linear_token_stats",
    _fused,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? rows, Tensor? gold_ids, "
    "Tensor? gold_offsets, Tensor? gold_problem, Tensor? bias, Tensor token_weight, float softcap, "
    "float logit_scale, int ignore_index, bool need_hidden, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
fused_head.register_fake(_fake)
fused_head.register_autograd(_backward, setup_context=_setup_context)
torch.library.custom_op(
    "compact_fused::common_factor",
    _common_factor,
    mutates_args=(),
    schema="(Tensor grad, Tensor token_weight) -> Tensor",
).register_fake(lambda grad, token_weight: grad.new_empty(()))
