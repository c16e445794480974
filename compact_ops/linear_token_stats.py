"""Statistics and gradients of the LM head for a list of tokens, without storing their logits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import (
    STASH_BLOCK,
    backend,
    empty_head_statistics,
    named_statistics,
    refuse_second_derivative,
    register_autograd,
    register_fake,
)
from compact_ops.fused_weights import (
    Weigher,
    fused_head,
    to_rows,
    weigh_tokens,
    weighed,
    without_ignored,
)
from compact_ops.types import GoldAnswers, TokenStats

_OP = "linear_token_stats"
_LOG = logging.getLogger("compact_ops")

# What the forward keeps for the backward; the flags of `keep` in csrc/library.cpp.
_NOTHING, _UNIT, _STASH = 0, 1, 2

STATISTICS = ("rank", "sum_p2", "margin")
"""The statistics that a call may ask for by name; `TokenStats` says what they are."""


STASH_BYTES = 1 << 29
"""The largest stash that head_grad="auto" keeps, in bytes."""


class HeadPlan(NamedTuple):
    """How the gradients of the head are computed.

    Attributes:
        mode: "none", "frozen", "stash", "recompute" or "fused-weights".
        products: number of matrix products of size M x H x V in forward and backward together.
        kept_bytes: memory kept between forward and backward.
    """

    mode: str
    products: int
    kept_bytes: int


def plan_head_grad(
    head_grad: str,
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    train_hidden: bool,
    train_head: bool,
    weighed: bool = False,
    budget_bytes: int = STASH_BYTES,
) -> HeadPlan:
    """Picks the gradient mode of the head for "auto", or checks the given mode.

    Args:
        head_grad: "auto", "frozen", "stash", "recompute" or "fused-weights". If the head is not
            trained, "fused-weights" becomes "frozen", which costs the same and works for any loss.
        tokens: M.
        width: H.
        vocabulary: V.
        train_hidden: whether the hidden states require a gradient.
        train_head: whether the head's weight or bias requires a gradient.
        weighed: whether the call has a token_weight.
        budget_bytes: "auto" picks "stash" if the stash has at most this many bytes, else
            "recompute".

    Raises:
        ValueError: the mode is unknown, or does not fit the gradients or weights of the call.
    """
    modes = ("auto", "frozen", "stash", "recompute", "fused-weights")
    if head_grad not in modes:
        raise ValueError(f"{_OP}: head_grad must be one of {', '.join(modes)}, got {head_grad!r}")
    if head_grad == "frozen" and train_head:
        raise ValueError(
            f"{_OP}: head_grad must not be 'frozen' if weight or bias requires a gradient"
        )
    if (head_grad == "fused-weights") > weighed:
        raise ValueError(f"{_OP}: head_grad 'fused-weights' needs token_weight, got None")
    if weighed and head_grad not in ("auto", "fused-weights"):
        raise ValueError(
            f"{_OP}: token_weight must be None with head_grad {head_grad!r}, got weights"
        )
    unit_bytes = 4 * tokens * width if train_hidden else 0
    stash_bytes = 2 * tokens * vocabulary
    if not train_hidden and not train_head:
        return HeadPlan("none", 1, 0)
    if weighed and train_head:
        return HeadPlan("fused-weights", 2 + train_hidden, unit_bytes + 4 * vocabulary * width)
    if head_grad == "auto":
        if not train_head:
            head_grad = "frozen"
        else:
            head_grad = "stash" if stash_bytes <= budget_bytes else "recompute"
    if head_grad == "recompute":
        return HeadPlan("recompute", 2 + train_hidden + train_head, 0)
    if not train_head:
        return HeadPlan("frozen", 2, unit_bytes)
    return HeadPlan("stash", 2 + train_hidden, unit_bytes + stash_bytes)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    gold: GoldAnswers | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    head_grad: str = "auto",
    filter_eps: float = 0.0,
    token_weight: Tensor | Weigher | None = None,
    problem_offsets: Sequence[int] | None = None,
    statistics: Collection[str] = (),
    score_ids: Tensor | None = None,
) -> TokenStats:
    """Returns statistics of z = softcap(logit_scale * hidden @ weight.T + bias) for M targets.

    One pass over the vocabulary gives the statistics and, if `hidden` requires a gradient, the unit
    gradient d nll / d hidden of every token. The backward of nll multiplies the unit gradients by
    the upstream gradient; where that is 0 a token adds nothing, also if its logits are not finite.
    The M x V logits are never stored. Only `nll` is differentiable.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64 hidden states.
        weight: [V, H] the head, of any of these dtypes. The arithmetic is float32, or float64 for
            float64 hidden. On CUDA this does not hold for matrix products: they have the dtype of
            hidden, to which weight is cast. With bfloat16 hidden, logits are rounded by up to 2^-8
            of themselves before the statistics are taken, a logit of 20 by up to 0.06.
        target: [M] int32 or int64 token ids; M = N without `rows`.
        rows: [M] int32 or int64, token m reads hidden[rows[m]]; with None it reads hidden[m]. Rows
            may repeat.
        gold: the gold answers; gives gold_logit and gold_logp of every token.
        bias: [V] or None.
        softcap: c of c * tanh(x / c), or None.
        logit_scale: multiplies hidden @ weight.T, before the bias.
        ignore_index: tokens with this target have nll 0, correct False and no gradient.
        head_grad: how the gradients are computed (see plan_head_grad).
            "frozen" keeps the unit gradient of hidden, [M, H].
            "stash" keeps also the unit gradient of the logits, [M, V] bfloat16, which rounds each
            term of the head's gradients by up to 2^-8 of itself.
            "recompute" keeps nothing and computes the logits again in the backward.
            "fused-weights" computes all gradients in the forward, for the loss
            (token_weight * nll).sum() or a multiple of it. For any other loss the backward computes
            them again, which is exact too, and logs a warning.
            "auto" picks a mode and logs it (logger "compact_ops", level INFO); never "stash" for
            float64.
        filter_eps: in the gradient of hidden, softmax entries p_v below this are rounded to 0 or to
            filter_eps, at random and without bias (see filtered_matmul); with 0 the gradient is
            exact. The error of a token's unit gradient has mean 0. It is at most
            logit_scale * filter_eps * sum_v |W_v|, and its expected square is at most
            logit_scale^2 * filter_eps * sum_v p_v |W_v|^2; both sums are over the rounded entries.
        token_weight: for "fused-weights", the weights in the loss: [M], or a function
            weigh(tokens, stats) -> [n]. It returns the weights of the n tokens in the slice
            `tokens` from their statistics (fields of n entries; `weight` is None), and is called
            once per chunk. No gradient flows into the weights. torch.compile does not trace the
            function.
        problem_offsets: [P + 1], only with a function: tokens of problem p are problem_offsets[p] :
            problem_offsets[p + 1]. The function then gets whole problems. A chunk has at most 256
            tokens or is one problem. The logits of one chunk are stored at a time.
        statistics: names of `STATISTICS` to compute in the same pass: "rank", "sum_p2", "margin".
            The rank and the margin are those of the logits that this call computes.
        score_ids: [M, C] int32 or int64, C <= 16: gives score_logp, log p of these ids for every
            token; -1 stands for no id.

    Returns:
        TokenStats of [M] tensors.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        RuntimeError: a target, row or id is out of range, or a token has no gold answer.
    """
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    count = hidden.shape[0]
    if rows is not None:
        count = _check.tensor(_OP, "rows", rows, _check.INTS, ["M"]).shape[0]
    _check.tensor(_OP, "target", target, _check.INTS, ["M"], M=count)
    _check.integer(_OP, "ignore_index", ignore_index)
    _check.number(_OP, "filter_eps", filter_eps, 0, inclusive=True)
    if gold is not None:
        _check.gold(_OP, gold, count)
    _check.statistics(_OP, statistics, STATISTICS)
    if score_ids is not None:
        _check.score_ids(_OP, score_ids, count)
    if isinstance(token_weight, Tensor):
        _check.tensor(_OP, "token_weight", token_weight, _check.FLOATS, ["M"], M=count)
    elif token_weight is not None and not callable(token_weight):
        found = type(token_weight).__name__
        raise TypeError(f"{_OP}: token_weight must be a Tensor or a function, got {found}")
    if problem_offsets is not None and not callable(token_weight):
        raise ValueError(
            f"{_OP}: problem_offsets must be None if token_weight is not a function, "
            f"got {problem_offsets}"
        )
    _check.together(
        _OP,
        hidden=hidden,
        weight=weight,
        target=target,
        rows=rows,
        bias=bias,
        score_ids=score_ids,
        token_weight=token_weight if isinstance(token_weight, Tensor) else None,
        **_check.gold_tensors(gold),
    )
    grad = torch.is_grad_enabled()
    train_hidden = grad and hidden.requires_grad
    train_head = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    plan = plan_head_grad(
        head_grad,
        count,
        hidden.shape[1],
        weight.shape[0],
        train_hidden=train_hidden,
        train_head=train_head,
        weighed=token_weight is not None,
        # The stash would round the gradients of the head in float64 too.
        budget_bytes=0 if hidden.dtype == torch.float64 else STASH_BYTES,
    )
    if head_grad == "auto" and train_head and not torch.compiler.is_compiling():
        _LOG.info(
            "%s: head_grad=auto picked %s (%d products, %.1f MB kept) for M=%d H=%d V=%d",
            _OP, plan.mode, plan.products, plan.kept_bytes / 1e6, count, *weight.shape[::-1],
        )  # fmt: skip
    if backend() == "reference":
        stats = reference.linear_token_stats(
            hidden,
            weight,
            target,
            rows=rows,
            gold=gold,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            statistics=statistics,
            score_ids=score_ids,
        )
    else:
        golds = (None, None, None) if gold is None else tuple(t.long() for t in gold)
        scores = None if score_ids is None else score_ids.long()
        row = None if rows is None else rows.long()
        where = hidden, weight, target.long(), row, *golds, bias, scores
        asked = tuple(name in statistics for name in STATISTICS)
        numbers = softcap or 0.0, logit_scale, ignore_index
        if plan.mode == "fused-weights" and token_weight is not None:
            needs = (
                hidden.requires_grad,
                weight.requires_grad,
                bias is not None and bias.requires_grad,
            )
            settings = (*numbers, filter_eps)
            out = fused_head(where, token_weight, problem_offsets, settings, needs, asked)
            token_weight = out[10]
        else:
            stash = _STASH | (_UNIT if train_hidden else _NOTHING)
            keep = {"frozen": _UNIT, "stash": stash}.get(plan.mode, _NOTHING)
            out = torch.ops.compact.linear_token_stats(*where, *numbers, keep, filter_eps, *asked)
        stats = named_statistics(out, gold is not None, score_ids is not None, asked)
    # Detach all but nll, so that a backward through another output raises instead of giving zeros.
    seen = stats.map(Tensor.detach)
    if token_weight is None:
        return seen._replace(nll=stats.nll)
    if not isinstance(token_weight, Tensor):
        token_weight = weigh_tokens(token_weight, weight, problem_offsets, seen)
    return seen._replace(nll=stats.nll, weight=token_weight.detach().to(stats.nll.dtype))


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
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    keep: int,
    filter_eps: float,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Returns the shapes and dtypes of the operator's outputs."""
    dtype = _check.compute_dtype(hidden)
    count, (vocabulary, width) = target.shape[0], weight.shape

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    stashed = count if keep & _STASH else 0
    return (
        *empty_head_statistics(hidden, count, gold_ids, score_ids, needs),
        empty(count if keep & _UNIT else 0, width),
        empty(stashed, vocabulary, dtype=torch.bfloat16),
        # On CUDA the stash is final and needs no shift, which has width 0.
        empty(stashed, 0 if hidden.is_cuda else -(-vocabulary // STASH_BLOCK), dtype=torch.float32),
    )


register_fake("compact::linear_token_stats", _fake)


def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    stash: Tensor | None,
    stash_shift: Tensor | None,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    filter_eps: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the shapes and dtypes of the gradients."""
    dtype = _check.compute_dtype(hidden)
    vocabulary, width = weight.shape
    return (
        hidden.new_empty((target.shape[0] if need_hidden else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_bias else 0,), dtype=dtype),
    )


register_fake("compact::linear_token_stats_backward", _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, rows, _, _, _, bias, _, *numbers = inputs
    softcap, logit_scale, ignore_index, keep, filter_eps = numbers[:5]
    nll, lse, *_, unit, stash, stash_shift = output
    ctx.numbers = softcap, logit_scale, ignore_index, filter_eps
    ctx.keep = keep
    # Only nll is differentiable: do not allocate zeros [M, V] for the stash's gradient.
    ctx.set_materialize_grads(False)
    # A frozen head needs only the unit gradient and where it goes.
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    again = keep == _NOTHING or trained
    ctx.num_rows, ctx.dtype = hidden.shape[0], hidden.dtype
    ctx.save_for_backward(
        target,
        rows,
        unit if keep & _UNIT else None,
        *((hidden, weight, bias, nll, lse) if again else (None,) * 5),
        *((stash, stash_shift) if keep & _STASH else (None, None)),
    )


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_second_derivative(_OP)
    if grad is None:
        return (None,) * 17
    target, rows, unit, hidden, weight, bias, nll, lse, stash, shift = ctx.saved_tensors
    softcap, logit_scale, ignore_index, filter_eps = ctx.numbers
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    need_bias = ctx.needs_input_grad[7]
    d_hidden: Any = None
    d_weight: Any = None
    d_bias: Any = None
    if need_weight or need_bias or (need_hidden and unit is None):
        d_hidden, d_weight, d_bias = torch.ops.compact.linear_token_stats_backward(
            grad, hidden, weight, target, rows, bias, nll, lse, stash, shift,
            softcap, logit_scale, ignore_index, filter_eps,
            need_hidden and unit is None, need_weight, need_bias,
        )  # fmt: skip
        d_weight = d_weight.to(weight.dtype) if need_weight else None
        d_bias = d_bias.to(bias.dtype) if need_bias else None
    d_read: Any = None
    if need_hidden:
        if unit is None:  # d_hidden is weighed
            d_read = d_hidden if rows is None else to_rows(d_hidden, rows, ctx.num_rows)
        else:
            scale = without_ignored(grad, target, ignore_index)
            if rows is None:
                d_read = weighed(unit, scale)
            else:
                run = torch.ops.compact.accumulate_weighted
                d_read = run(unit, rows, scale, None, ctx.num_rows)
        d_read = d_read.to(ctx.dtype)
    return (d_read, d_weight, None, None, None, None, None, d_bias) + (None,) * 9


register_autograd("compact::linear_token_stats", _backward, _setup_context)
