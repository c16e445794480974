"""The head's gradient mode "fused-weights": statistics, token weights and gradients in one forward.

The forward processes the tokens in chunks. One pass over the vocabulary gives the statistics and
unit gradients of a chunk and stores its softmax. Then the weights of the chunk's tokens are looked
up, or computed by a function. Then the chunk's part of dW is computed from the stored softmax. This
takes three matrix products, and only the gradients are kept.

If the loss is a multiple of (token_weight * nll).sum(), the backward multiplies the gradients by
one number. For any other loss it logs a warning and computes the exact gradients from new logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from compact_ops import _check
from compact_ops._library import (
    STASH_BLOCK,
    backend,
    empty_head_statistics,
    named_statistics,
    refuse_second_derivative,
    register_fake,
)
from compact_ops.types import TokenStats

Weigher = Callable[[slice, TokenStats], Tensor]

_OP = "linear_token_stats"
_LOG = logging.getLogger("compact_ops")

# Tokens per chunk: 256 x 49,152 float32 are 50 MB. With fewer tokens the products are slower.
CHUNK = 256
# Larger products are needed to fill a GPU: chunks whose logits take this many bytes, but of at most
# this many tokens.
_BLOCK_BYTES, _MOST_ON_GPU = 1 << 29, 4096
# The upstream gradient may differ from c * token_weight by this many units in the last place.
_ULPS = 64


def chunk_size(vocabulary: int, *, on_gpu: bool) -> int:
    """Returns the most tokens of a chunk, whose logits [n, V] are kept in float32."""
    if not on_gpu:
        return CHUNK
    return max(CHUNK, min(_MOST_ON_GPU, _BLOCK_BYTES // (4 * vocabulary)))


def chunk_bounds(count: int, problem_offsets: Sequence[int] | None, size: int = CHUNK) -> list[int]:
    """Cuts [0, count) into chunks of up to `size` tokens; with offsets, they hold whole problems.

    Args:
        count: M.
        problem_offsets: [P + 1] tokens of problem p are problem_offsets[p] :
            problem_offsets[p + 1]; a problem with more than `size` tokens is a chunk of its own.
        size: most tokens of a chunk, see `chunk_size`.

    Returns:
        Bounds of the chunks, from 0 to count; at least two bounds, so count = 0 is one empty chunk.

    Raises:
        ValueError: the offsets do not increase from 0 to count.
    """
    if problem_offsets is None:
        return [*range(0, max(count, 1), size), count]
    offsets = list(problem_offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != count or offsets != sorted(offsets):
        raise ValueError(
            f"{_OP}: problem_offsets must rise from 0 to M = {count}, got {problem_offsets}"
        )
    bounds = [0]
    for begin, end in pairwise(offsets):
        if begin > bounds[-1] and end - bounds[-1] > size:
            bounds.append(begin)
    return [*bounds, count]


def _bounds(weight: Tensor, target: Tensor, problem_offsets: Sequence[int] | None) -> list[int]:
    """Returns the bounds of the chunks for a head [V, H] and M targets."""
    size = chunk_size(weight.shape[0], on_gpu=weight.is_cuda)
    return chunk_bounds(target.shape[0], problem_offsets, size)


def weigh_chunk(weigh: Weigher | Tensor, tokens: slice, stats: TokenStats) -> Tensor:
    """Returns the weights [n] of a chunk of tokens, in the dtype of their statistics.

    Raises:
        TypeError, ValueError: the function did not return a float tensor [n].
    """
    if isinstance(weigh, Tensor):
        return weigh[tokens].to(stats.nll.dtype)
    count = stats.nll.shape[0]
    if count == 0:
        return stats.nll.new_empty(0)
    with torch.no_grad():
        found = weigh(tokens, stats)
    _check.tensor(_OP, "token_weight(...)", found, _check.FLOATS, ["n"], n=count)
    return found.detach().to(stats.nll)


def weigh_tokens(
    weigh: Weigher, weight: Tensor, problem_offsets: Sequence[int] | None, stats: TokenStats
) -> Tensor:
    """Returns the weights [M] of all tokens; calls `weigh` with the same chunks as `_sweep`.

    Args:
        weigh: the function.
        weight: the head [V, H].
        problem_offsets: see `chunk_bounds`.
        stats: the statistics of the tokens.
    """
    parts = []
    for begin, end in pairwise(_bounds(weight, stats.nll, problem_offsets)):
        some = slice(begin, end)
        parts.append(weigh_chunk(weigh, some, stats.map(itemgetter(some))))
    return torch.cat(parts)


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    score_ids: Tensor | None,
    weigh: Weigher | Tensor,
    bounds: Sequence[int],
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
    needs: tuple[bool, bool, bool],
    asked: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Returns ten statistics and the weights [M], d_hidden [N, H], d_weight [V, H], d_bias [V].

    A gradient that is not needed (`needs`) and a statistic that is not asked for have 0 rows.
    """
    need_hidden, need_weight, need_bias = needs
    dtype = _check.compute_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    read = hidden if rows is None else hidden[rows]
    # A GPU multiplies in the dtype of the hidden states, and adds in `dtype`.
    if read.is_cuda:
        weight = weight.to(read.dtype)
    else:
        read = read.to(dtype)
    d_read = read.new_empty((count if need_hidden else 0, width), dtype=dtype)
    d_weight = read.new_zeros((vocabulary if need_weight else 0, width), dtype=dtype)
    d_bias = read.new_zeros((vocabulary if need_bias else 0,), dtype=dtype)
    largest = max(end - begin for begin, end in pairwise(bounds))
    blocks = read.new_empty((largest, vocabulary), dtype=dtype)
    parts = []
    for begin, end in pairwise(bounds):
        some = slice(begin, end)
        *stats, unit, shift = torch.ops.compact.linear_token_stats_fused(
            blocks, read[some], weight, target[some], gold_ids, gold_offsets,
            None if gold_problem is None else gold_problem[some],
            bias, None if score_ids is None else score_ids[some],
            softcap, logit_scale, ignore_index, filter_eps, need_hidden, *asked,
        )  # fmt: skip
        by_name = named_statistics(stats, gold_ids is not None, score_ids is not None, asked)
        scale = weigh_chunk(weigh, some, by_name)
        parts.append((*stats, scale))
        if need_hidden:
            d_read[some] = weighed(unit, without_ignored(scale, target[some], ignore_index))
        if need_weight or need_bias:
            torch.ops.compact.linear_token_stats_fused_backward(
                d_weight, d_bias, blocks, scale, read[some], target[some], stats[0], stats[1],
                shift, softcap, logit_scale, ignore_index,
            )  # fmt: skip
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if need_hidden and rows is not None:
        d_read = to_rows(d_read, rows, hidden.shape[0])
    return *columns, d_read, d_weight, d_bias


def without_ignored(upstream: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Returns upstream [M], 0 for ignored tokens, also where it is not finite."""
    return upstream.masked_fill(target == ignore_index, 0)


def weighed(unit: Tensor, upstream: Tensor) -> Tensor:
    """Returns upstream[m] * unit[m], [M, H]; 0 where upstream is 0, also if unit is not finite."""
    return (upstream[:, None] * unit).masked_fill_((upstream == 0)[:, None], 0)


def to_rows(each: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Adds up the gradients [M, H] of the tokens that read the same row; returns [N, H]."""
    ones = each.new_ones(rows.shape)
    out: Tensor = torch.ops.compact.accumulate_weighted(each, rows, ones, None, num_rows)
    return out


def _fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    score_ids: Tensor | None,
    token_weight: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *asked: bool,
) -> tuple[Tensor, ...]:
    """`_sweep` with known weights, as one operator for torch.compile."""
    out = _sweep(
        hidden, weight, target, rows, gold_ids, gold_offsets, gold_problem, bias,
        score_ids, token_weight, _bounds(weight, target, None),
        softcap, logit_scale, ignore_index, filter_eps, (need_hidden, need_weight, need_bias),
        asked,
    )  # fmt: skip
    return *out[:10], *out[11:]


def _fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    score_ids: Tensor | None,
    token_weight: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *asked: bool,
) -> tuple[Tensor, ...]:
    dtype = _check.compute_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape
    return (
        *empty_head_statistics(hidden, count, gold_ids, score_ids, asked),
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_bias else 0,), dtype=dtype),
    )


def _chunk_fake(
    blocks: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gold_ids: Tensor | None,
    gold_offsets: Tensor | None,
    gold_problem: Tensor | None,
    bias: Tensor | None,
    score_ids: Tensor | None,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    *asked: bool,
) -> tuple[Tensor, ...]:
    """Shapes and dtypes of one chunk."""
    count, (vocabulary, width) = target.shape[0], weight.shape
    # The CUDA kernels need no references: their blocks are final.
    references = 0 if hidden.is_cuda else -(-vocabulary // STASH_BLOCK)
    return (
        *empty_head_statistics(hidden, count, gold_ids, score_ids, asked),
        blocks.new_empty((count if need_hidden else 0, width)),
        blocks.new_empty((count, references)),
    )


register_fake("compact::linear_token_stats_fused", _chunk_fake)
register_fake("compact::linear_token_stats_fused_backward", lambda *_: None)


def _common_factor(grad: Tensor, token_weight: Tensor) -> float | None:
    """Returns the c with grad = c * token_weight up to rounding, or None if there is none."""
    wide, given = token_weight.double(), grad.double()
    square = wide.square().sum()
    factor = torch.where(square > 0, (given * wide).sum() / square, 0.0)
    error = (given - factor * wide).abs()
    kind = torch.finfo(grad.dtype)
    near = error <= _ULPS * kind.eps * (factor * wide).abs() + kind.tiny
    # Both at once: a GPU is waited for once.
    found, all_near = torch.stack([factor, near.all().double()]).tolist()
    return found if all_near else None


def _gradients(
    grad: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    token_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients for the upstream gradient `grad` [M] of nll.

    d_hidden, d_weight and d_bias are the gradients for the upstream gradient token_weight [M].
    """
    # An ignored token has nll 0 with any weight, so its upstream gradient does not matter.
    live = target != ignore_index
    factor = _common_factor(torch.where(live, grad, 0), torch.where(live, token_weight, 0))
    if factor == 1.0:
        return d_hidden, d_weight, d_bias
    if factor == 0.0:  # no product, because a gradient may not be finite
        return torch.zeros_like(d_hidden), torch.zeros_like(d_weight), torch.zeros_like(d_bias)
    if factor is not None:
        return factor * d_hidden, factor * d_weight, factor * d_bias
    _LOG.warning(
        "%s: head_grad=fused-weights computes the gradients again (2 to 3 more products), because "
        "the loss is not a multiple of (token_weight * nll).sum()",
        _OP,
    )
    needs = d_hidden.shape[0] > 0, d_weight.shape[0] > 0, d_bias.shape[0] > 0
    d_read, d_weight, d_bias = torch.ops.compact.linear_token_stats_backward(
        grad, hidden, weight, target, rows, bias, nll, lse, None, None,
        softcap, logit_scale, ignore_index, filter_eps, *needs,
    )  # fmt: skip
    if needs[0] and rows is not None:
        d_read = to_rows(d_read, rows, hidden.shape[0])
    return d_read, d_weight, d_bias


def _gradients_copied(*arguments: Any) -> tuple[Tensor, ...]:
    """`_gradients` as an operator, which must not return its inputs: it copies them."""
    return tuple(
        g.clone() if g is given else g
        for g, given in zip(_gradients(*arguments), arguments[1:4], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, rows, _, _, _, bias, _, token_weight, *numbers = inputs
    nll, lse, *_, d_hidden, d_weight, d_bias = output
    ctx.numbers = numbers[:4]
    # Do not allocate zeros [V, H] for outputs without an upstream gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        d_hidden, d_weight, d_bias, token_weight, hidden, weight, target, rows, bias, nll, lse
    )


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative(_OP)
    if grad is None:
        return (None,) * 20
    saved = ctx.saved_tensors
    # The operator copies what it returns. Without a copy, a caller that changes its gradients would
    # change those of a later backward. Tensors of a tracer have another type and no values.
    last = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    run = _gradients if last else torch.ops.compact_fused.gradients
    found = run(grad, *saved, *ctx.numbers)
    # A saved output that is returned itself still has this node as its grad_fn.
    found = tuple(g.detach() for g in found)
    kinds = (saved[4], saved[5], saved[8])  # hidden, weight, bias
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[7]
    d_hidden, d_weight, d_bias = (
        g.to(like.dtype) if need else None
        for g, need, like in zip(found, needs, kinds, strict=True)
    )
    return d_hidden, d_weight, None, None, None, None, None, d_bias, *(None,) * 12


class _Weighed(torch.autograd.Function):
    """`_sweep` with a function for the weights of a chunk; torch.compile cannot trace it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """Takes the arguments of `_fused`, with (function, bounds) instead of the weights."""
        hidden, weight, target, rows, gold_ids, gold_offsets, gold_problem, bias = inputs[:8]
        score_ids, (weigh, bounds) = inputs[8:10]
        softcap, logit_scale, ignore_index, filter_eps = inputs[10:14]
        out = _sweep(
            hidden, weight, target, rows, gold_ids, gold_offsets, gold_problem, bias, score_ids,
            weigh, bounds,
            softcap, logit_scale, ignore_index, filter_eps, inputs[14:17], inputs[17:],
        )  # fmt: skip
        stats, weights, gradients = out[:10], out[10], out[11:]
        _setup_context(ctx, (*inputs[:9], weights, *inputs[10:]), (*stats, *gradients))
        ctx.mark_non_differentiable(*stats[1:], weights)
        return *stats, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """See `_backward`."""
        return _backward(ctx, *grads)


def fused_head(
    where: tuple[Tensor | None, ...],
    token_weight: Tensor | Weigher,
    problem_offsets: Sequence[int] | None,
    numbers: tuple[float, float, int, float],
    needs: tuple[bool, bool, bool],
    asked: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Returns the statistics of the head, with a differentiable nll, and the token weights.

    Args:
        where: hidden, weight, target, rows, gold_ids, gold_offsets, gold_problem, bias, score_ids.
        token_weight: [M], or a function that returns the weights of a chunk of tokens.
        problem_offsets: see chunk_bounds; only with a function.
        numbers: softcap (0: none), logit_scale, ignore_index, filter_eps.
        needs: whether hidden, weight and bias need a gradient.
        asked: whether rank, sum_p2 and margin are asked for.

    Returns:
        nll, lse, entropy, correct, gold_logit, gold_logp, rank, sum_p2, margin, score_logp, token
        weights; see TokenStats.
    """
    if isinstance(token_weight, Tensor):
        known = token_weight.detach()
        out = torch.ops.compact_fused.linear_token_stats(*where, known, *numbers, *needs, *asked)
        return *out[:10], known
    head, target = where[1:3]
    assert head is not None and target is not None
    bounds = _bounds(head, target, problem_offsets)
    weighed: tuple[Tensor, ...] = _Weighed.apply(  # type: ignore[no-untyped-call]
        *where, (token_weight, bounds), *numbers, *needs, *asked
    )
    return weighed


if backend() == "native":
    _tensors = (
        "Tensor hidden, Tensor weight, Tensor target, Tensor? rows, Tensor? gold_ids, "
        "Tensor? gold_offsets, Tensor? gold_problem, Tensor? bias, Tensor? score_ids, "
        "Tensor token_weight"
    )
    _numbers = "float softcap, float logit_scale, int ignore_index, float filter_eps"
    _op = torch.library.custom_op(
        "compact_fused::linear_token_stats",
        _fused,
        mutates_args=(),
        schema=f"({_tensors}, {_numbers}, bool need_hidden, bool need_weight, bool need_bias, "
        f"bool need_rank, bool need_sum_p2, bool need_margin) -> ({', '.join(['Tensor'] * 13)})",
    )
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_setup_context)
    torch.library.custom_op(
        "compact_fused::gradients",
        _gradients_copied,
        mutates_args=(),
        schema="(Tensor grad, Tensor d_hidden, Tensor d_weight, Tensor d_bias, "
        "Tensor token_weight, Tensor hidden, Tensor weight, Tensor target, Tensor? rows, "
        f"Tensor? bias, Tensor nll, Tensor lse, {_numbers}) -> (Tensor, Tensor, Tensor)",
    ).register_fake(lambda *a: tuple(torch.empty_like(g) for g in a[1:4]))
