"""Divergence between the next-token distributions of two models, in blocks of the vocabulary.

Written in torch, for any device; there is no kernel of its own yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend

_OP = "head_divergence"
KINDS = ("forward", "reverse", "jsd")
# Logits of one block of each model at a time: 2^22 numbers, 16 MiB in float32.
_BLOCK = 1 << 22


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
    the vocabulary is the same. The logits are computed one block of the vocabulary at a time: once
    for the normalisers, once for the divergence, and once more in the backward. No [N, V] tensor
    of either model is stored.

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
        bias.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check.head(_OP, hidden, weight, bias, softcap, logit_scale)
    sizes = {"N": hidden.shape[0], "V": weight.shape[0]}
    _check.tensor(_OP, "teacher_hidden", teacher_hidden, _check.FLOATS, ["N", "H2"], **sizes)
    sizes["H2"] = teacher_hidden.shape[1]
    _check.tensor(_OP, "teacher_weight", teacher_weight, _check.FLOATS, ["V", "H2"], **sizes)
    if teacher_bias is not None:
        _check.tensor(_OP, "teacher_bias", teacher_bias, _check.FLOATS, ["V"], **sizes)
    if teacher_softcap is not None:
        _check.number(_OP, "teacher_softcap", teacher_softcap, 0, inclusive=False)
    if kind not in KINDS:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0.0 < mix < 1.0:
        raise ValueError(f"{_OP}: mix must be between 0 and 1, got {mix}")
    _check.same_device(
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
    value: Tensor = torch.ops.compact.head_divergence(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, KINDS.index(kind), mix,
        softcap or 0.0, logit_scale, teacher_softcap or 0.0, teacher_logit_scale,
    )[0]  # fmt: skip
    return value


class _Head(NamedTuple):
    """One model: z = cap tanh((scale hidden @ weight.T + bias) / cap); cap = 0 is no cap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    cap: float
    scale: float

    def logits(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns the logits [N, end - begin] of a block of the vocabulary."""
        z = self.scale * (self.hidden.to(dtype) @ self.weight[begin:end].to(dtype).T)
        if self.bias is not None:
            z = z + self.bias[begin:end].to(dtype)
        return self.cap * torch.tanh(z / self.cap) if self.cap else z


def _blocks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of the blocks of the vocabulary."""
    size = max(_BLOCK // max(rows, 1), 256)
    for begin in range(0, vocabulary, size):
        yield begin, min(begin + size, vocabulary)


def _normaliser(head: _Head, dtype: torch.dtype) -> Tensor:
    """Returns the log-sum-exp [N] of the logits."""
    rows = head.hidden.shape[0]
    total = head.hidden.new_full((rows,), -torch.inf, dtype=dtype)
    for begin, end in _blocks(rows, head.weight.shape[0]):
        total = torch.logaddexp(total, head.logits(begin, end, dtype).logsumexp(1))
    return total


def _mixture(log_q: Tensor, log_p: Tensor, mix: float) -> Tensor:
    """Returns log(b p + (1 - b) q) from the logarithms."""
    b = log_q.new_tensor(mix)
    return torch.logaddexp(log_p + b.log(), log_q + (1 - b).log())


def _product(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Returns p * log_ratio; 0 where p is 0, also if the logarithm is not finite there."""
    return torch.where(p > 0, p * log_ratio, 0)


def _terms(log_q: Tensor, log_p: Tensor, kind: int, mix: float) -> tuple[Tensor, Tensor]:
    """Returns the summands [N, block] of the divergence, and those of sum_v q_v d D / d q_v.

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


def _pair(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    numbers: tuple[float, float, float, float],
) -> tuple[_Head, _Head]:
    cap, scale, teacher_cap, teacher_scale = numbers
    return (
        _Head(hidden, weight, bias, cap, scale),
        _Head(teacher_hidden, teacher_weight, teacher_bias, teacher_cap, teacher_scale),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns divergence, sum_v q_v d D / d q_v and both normalisers, each [N]."""
    dtype = _check.compute_dtype(hidden)
    numbers = (softcap, logit_scale, teacher_softcap, teacher_logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        own, teacher = _pair(
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, numbers
        )
        lse, teacher_lse = _normaliser(own, dtype), _normaliser(teacher, dtype)
        total, slope = torch.zeros_like(lse), torch.zeros_like(lse)
        for begin, end in _blocks(hidden.shape[0], weight.shape[0]):
            log_q = own.logits(begin, end, dtype) - lse[:, None]
            log_p = teacher.logits(begin, end, dtype) - teacher_lse[:, None]
            value, mine = _terms(log_q, log_p, kind, mix)
            total, slope = total + value.sum(1), slope + mine.sum(1)
    return total, slope, lse, teacher_lse


@_forward_op.register_fake
def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    a, b, c, d = (hidden.new_empty((hidden.shape[0],), dtype=dtype) for _ in range(4))
    return a, b, c, d


@torch.library.custom_op("compact::head_divergence_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
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
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d hidden [N, H], d weight [V, H] and d bias [V]; the last two empty if not needed.

    d D / d z_v = q_v (d D / d q_v - sum_u q_u d D / d q_u).
    """
    dtype = _check.compute_dtype(hidden)
    numbers = (softcap, logit_scale, teacher_softcap, teacher_logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        own, teacher = _pair(
            hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, numbers
        )
        d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype)
        vocabulary = weight.shape[0] if need_weight else 0
        d_weight = weight.new_zeros((vocabulary, weight.shape[1]), dtype=dtype)
        d_bias = weight.new_zeros((vocabulary,), dtype=dtype)
        for begin, end in _blocks(hidden.shape[0], weight.shape[0]):
            z = own.logits(begin, end, dtype)
            log_q = z - lse[:, None]
            log_p = teacher.logits(begin, end, dtype) - teacher_lse[:, None]
            _, mine = _terms(log_q, log_p, kind, mix)
            dz = grad[:, None] * (mine - log_q.exp() * slope[:, None])
            if softcap:
                dz = dz * (1 - (z / softcap).square())
            d_hidden = d_hidden + logit_scale * (dz @ weight[begin:end].to(dtype))
            if need_weight:
                d_weight[begin:end] = logit_scale * (dz.T @ hidden.to(dtype))
                d_bias[begin:end] = dz.sum(0)
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _backward_fake(
    grad: Tensor,
    slope: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _check.compute_dtype(hidden)
    vocabulary = weight.shape[0] if rest[-1] else 0
    return (
        hidden.new_empty(hidden.shape, dtype=dtype),
        weight.new_empty((vocabulary, weight.shape[1]), dtype=dtype),
        weight.new_empty((vocabulary,), dtype=dtype),
    )


def _refuse(*_: Any) -> None:
    raise NotImplementedError("head_divergence: there is no second derivative")


_backward_op.register_autograd(_refuse)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, slope, lse, teacher_lse = output
    ctx.save_for_backward(slope, lse, teacher_lse, *inputs[:6])
    ctx.numbers = inputs[6:]
    ctx.mark_non_differentiable(slope, lse, teacher_lse)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    slope, lse, teacher_lse, *tensors = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    d_hidden, d_weight, d_bias = torch.ops.compact.head_divergence_backward(
        grad, slope, lse, teacher_lse, *tensors, *ctx.numbers, need_weight or need_bias
    )
    hidden, weight, bias = tensors[:3]
    found = (
        d_hidden.to(hidden.dtype) if need_hidden else None,
        d_weight.to(weight.dtype) if need_weight else None,
        d_bias.to(bias.dtype) if need_bias else None,
    )
    return (*found, *[None] * 9)


_forward_op.register_autograd(_backward, setup_context=_setup)
