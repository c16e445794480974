"""Divergence between the next-token distributions of two models, a few rows at a time.

Written in torch, for any device: the time goes into matrix products, which a kernel would call too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, refuse_second_derivative
from compact_ops.fused_weights import weighed

_OP = "head_divergence"
KINDS = ("forward", "reverse", "jsd")
# Logits of one block of rows of each model at a time: 2^22 numbers, 16 MiB in float32. On a GPU
# 2^26: it needs larger products, and every block converts the heads again.
_BLOCK, _BLOCK_ON_GPU = 1 << 22, 1 << 26
# Rows of a head that are converted at a time, where it has another dtype than the arithmetic.
_SLICE = 8192


def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "forward",
    mix: float = 0.5,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> Tensor:
    """Returns the divergence of q = softmax(z) from p = softmax(z of the teacher), row by row.

    z is as in linear_token_stats, with a head of its own for each model. The two widths may differ;
    the vocabulary is the same. The logits are computed for a few rows at a time, together with the
    gradient: no [N, V] tensor of either model is stored. With a trained head they are computed once
    more in the backward.

    - "forward": KL(p || q) = sum_v p_v (log p_v - log q_v)
    - "reverse": KL(q || p)
    - "jsd": b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = `mix`

    Args:
        hidden: [N, H] hidden states of the student: float32, bfloat16, float16 or float64.
        weight: [V, H] the student's head.
        teacher_hidden: [N, H2] hidden states of the teacher. No gradient flows into the teacher.
        teacher_weight: [V, H2] the teacher's head.
        kind: "forward", "reverse" or "jsd".
        mix: b of "jsd", between 0 and 1, both excluded.
        bias: [V] or None.
        softcap: c of c * tanh(x / c), or None.
        logit_scale: multiplies hidden @ weight.T.
        teacher_bias: [V] or None.
        teacher_softcap: that of the teacher.
        teacher_logit_scale: that of the teacher.

    Returns:
        [N] float32 (float64 for float64 `hidden`), in nats; differentiable in hidden, weight and
        bias. A row whose upstream gradient is 0 adds nothing, also if its logits are not finite.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    sizes = {"N": hidden.shape[0], "V": weight.shape[0]}
    _check.tensor(_OP, "teacher_hidden", teacher_hidden, _check.FLOATS, ["N", "H2"], **sizes)
    sizes["H2"] = teacher_hidden.shape[1]
    _check.tensor(_OP, "teacher_weight", teacher_weight, _check.FLOATS, ["V", "H2"], **sizes)
    _check.terms(
        _OP, sizes["V"], teacher_bias, teacher_softcap, teacher_logit_scale, prefix="teacher_"
    )
    if kind not in KINDS:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    _check.number(_OP, "mix", mix)
    if not 0.0 < mix < 1.0:
        raise ValueError(f"{_OP}: mix must be between 0 and 1, got {mix}")
    _check.together(
        _OP,
        hidden=hidden,
        weight=weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
    )
    if backend() == "reference":
        return reference.head_divergence(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            kind=kind,
            mix=mix,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            teacher_bias=teacher_bias,
            teacher_softcap=teacher_softcap,
            teacher_logit_scale=teacher_logit_scale,
        )
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    gradient = torch.is_grad_enabled() and hidden.requires_grad and not trains_head
    value: Tensor = torch.ops.compact.head_divergence(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, KINDS.index(kind), mix,
        softcap or 0.0, logit_scale, teacher_softcap or 0.0, teacher_logit_scale, gradient,
    )[0]  # fmt: skip
    return value


class _Head(NamedTuple):
    """One model: z = cap tanh((scale hidden @ weight.T + bias) / cap); cap = 0 is no cap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cap: float
    scale: float

    def logits(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Returns the logits [n, V] of some rows."""
        hidden = self.scale * self.hidden[rows].to(dtype)
        z = hidden.new_empty((hidden.shape[0], self.weight.shape[0]))
        for part in self.parts(dtype):
            torch.mm(hidden, self.weight[part].to(dtype).T, out=z[:, part])
        if self.bias is not None:
            z += self.bias.to(dtype)
        return z.div_(self.cap).tanh_().mul_(self.cap) if self.cap else z

    def back(self, dz: Tensor) -> Tensor:
        """Returns the gradient [n, H] of hidden states from that of their products [n, V]."""
        out = dz.new_zeros((dz.shape[0], self.weight.shape[1]))
        for part in self.parts(dz.dtype):
            out.addmm_(dz[:, part], self.weight[part].to(dz.dtype), alpha=self.scale)
        return out

    def parts(self, dtype: torch.dtype) -> Iterator[slice]:
        """Yields slices of the vocabulary: all of it, unless the head must be converted."""
        vocabulary = self.weight.shape[0]
        size = vocabulary if self.weight.dtype == dtype else _SLICE
        for begin in range(0, vocabulary, size):
            yield slice(begin, min(begin + size, vocabulary))


def _blocks(rows: int, vocabulary: int, *, on_gpu: bool) -> Iterator[slice]:
    """Yields blocks of rows."""
    size = max((_BLOCK_ON_GPU if on_gpu else _BLOCK) // vocabulary, 1)
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


def _mixture(log_q: Tensor, log_p: Tensor, mix: float) -> Tensor:
    """Returns log(b p + (1 - b) q) from the logarithms."""
    return torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))


def _product(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Returns p * log_ratio; 0 where p is 0, also if the logarithm is not finite there.

    A NaN in p stays one.
    """
    return torch.where(p == 0, 0, p * log_ratio)


def _terms(log_q: Tensor, log_p: Tensor, kind: int, mix: float) -> tuple[Tensor, Tensor]:
    """Returns the summands [n, V] of the divergence, and those of sum_v q_v d D / d q_v.

    d D / d q_v, up to a constant that the softmax removes, is -p_v / q_v for "forward",
    log(q_v / p_v) for "reverse" and (1 - b) log(q_v / m_v) for "jsd".
    """
    if kind == 0:
        p = log_p.exp()
        return _product(p, log_p - log_q), -p
    q = log_q.exp()
    if kind == 1:
        found = _product(q, log_q - log_p)
        return found, found
    log_m = _mixture(log_q, log_p, mix)
    mine = (1 - mix) * _product(q, log_q - log_m)
    return mix * _product(log_p.exp(), log_p - log_m) + mine, mine


def _block(
    own: _Head, teacher: _Head, rows: slice, kind: int, mix: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the divergence [n] of some rows, and its gradient by their products [n, V].

    d D / d z_v = q_v (d D / d q_v - sum_u q_u d D / d q_u).
    """
    z = own.logits(rows, dtype)
    log_q = z - z.logsumexp(1, keepdim=True)
    log_p = teacher.logits(rows, dtype)
    log_p -= log_p.logsumexp(1, keepdim=True)
    value, mine = _terms(log_q, log_p, kind, mix)
    dz = mine - log_q.exp_() * mine.sum(1, keepdim=True)
    if own.cap:
        dz *= 1 - z.div_(own.cap).square_()
    return value.sum(1), dz


@torch.library.custom_op("compact::head_divergence", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    kind: int,
    mix: float,
    softcap: float,
    logit_scale: float,
    teacher_softcap: float,
    teacher_logit_scale: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the divergence [N] and, if asked for, its gradient by the hidden states [N, H]."""
    dtype = _check.compute_dtype(hidden)
    own = _Head(hidden, weight, bias, softcap, logit_scale)
    teacher = _Head(
        teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
    )
    divergence = hidden.new_empty(hidden.shape[:1], dtype=dtype)
    unit = hidden.new_empty((len(hidden) if gradient else 0, hidden.shape[1]), dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(hidden.shape[0], weight.shape[0], on_gpu=hidden.is_cuda):
            divergence[rows], dz = _block(own, teacher, rows, kind, mix, dtype)
            if gradient:
                unit[rows] = own.back(dz)
    return divergence, unit


@_forward_op.register_fake
def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    rows = hidden.shape[0] if rest[-1] else 0
    return (
        hidden.new_empty((hidden.shape[0],), dtype=dtype),
        hidden.new_empty((rows, hidden.shape[1]), dtype=dtype),
    )


@torch.library.custom_op("compact::head_divergence_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    kind: int,
    mix: float,
    softcap: float,
    logit_scale: float,
    teacher_softcap: float,
    teacher_logit_scale: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d hidden [N, H], d weight [V, H] and d bias [V]; 0 rows where not needed."""
    dtype = _check.compute_dtype(hidden)
    own = _Head(hidden, weight, bias, softcap, logit_scale)
    teacher = _Head(
        teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
    )
    (count, width), vocabulary = hidden.shape, weight.shape[0]
    d_hidden = hidden.new_empty((count if need_hidden else 0, width), dtype=dtype)
    d_weight = hidden.new_zeros((vocabulary if need_weight else 0, width), dtype=dtype)
    d_bias = hidden.new_zeros((vocabulary if need_bias else 0,), dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(count, vocabulary, on_gpu=hidden.is_cuda):
            dz = weighed(_block(own, teacher, rows, kind, mix, dtype)[1], grad[rows])
            if need_hidden:
                d_hidden[rows] = own.back(dz)
            if need_weight:
                d_weight.addmm_(dz.T, hidden[rows].to(dtype), alpha=logit_scale)
            if need_bias:
                d_bias += dz.sum(0)
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    (count, width), vocabulary = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty((count if need_hidden else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_weight else 0, width), dtype=dtype),
        hidden.new_empty((vocabulary if need_bias else 0,), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    unit = output[1]
    ctx.mark_non_differentiable(unit)
    ctx.numbers, ctx.kept = inputs[6:12], inputs[12]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*((unit,) if ctx.kept else inputs[:6]))


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_second_derivative(_OP)
    needs = ctx.needs_input_grad[:3]
    found: tuple[Tensor | None, ...]
    if ctx.kept:
        found = (weighed(ctx.saved_tensors[0], grad), None, None)
    else:
        found = torch.ops.compact.head_divergence_backward(
            grad, *ctx.saved_tensors, *ctx.numbers, *needs
        )
    needed = zip(found, ctx.dtypes, needs, strict=True)
    given = (d.to(t) if need and d is not None and t is not None else None for d, t, need in needed)
    return (*given, *[None] * 10)


_forward_op.register_autograd(_backward, setup_context=_setup)
