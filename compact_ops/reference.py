"""The specification: each operator in plain torch, differentiable, for any dtype.

The public functions use it if COMPACT_OPS_BACKEND=reference is set, or if the package was installed
without native libraries. The tests use it in float64 as the truth. It stores every intermediate
tensor and is not meant to be fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from compact_ops import _values
from compact_ops.flash_tree import TreeTables
from compact_ops.types import GoldAnswers, ProblemWeights, TokenStats

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _in_float32(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes `op` ignore autocast, as the kernels do."""

    @functools.wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return op(*args, **kwargs)

    return run


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """Returns [M, V] final logits in float32 (float64 for float64 input)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return _finish(hidden.to(dtype) @ weight.T.to(dtype), bias, softcap, logit_scale)


def _finish(raw: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """Returns z = softcap(logit_scale * raw + bias) of raw logits; softcap(x) = c tanh(x / c)."""
    x = logit_scale * raw.to(torch.promote_types(raw.dtype, torch.float32))
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def _others(z: Tensor, index: Tensor) -> Tensor:
    """Returns a copy of z [M, V] with -inf at the target of each row."""
    return z.scatter(1, index[:, None], -torch.inf)


def _stats(
    z: Tensor,
    target: Tensor,
    gold: GoldAnswers | None,
    ignore_index: int,
    statistics: Collection[str] = (),
    score_ids: Tensor | None = None,
) -> TokenStats:
    """Returns the statistics of final logits z [M, V]."""
    live = target != ignore_index
    index = torch.where(live, target, 0).long()
    lse = torch.logsumexp(z, dim=1)
    target_logit = z.gather(1, index[:, None])[:, 0]
    nll = torch.where(live, lse - target_logit, 0)
    with torch.no_grad():
        logp = z - lse[:, None]
        p = logp.exp()
        entropy = -torch.where(p > 0, p * logp, p).sum(dim=1)
        correct = live & (target_logit >= z.amax(dim=1))
        stats = TokenStats(nll, lse.detach(), entropy, correct, None, None)
        if "rank" in statistics:
            larger = (_others(z, index) > target_logit[:, None]).sum(dim=1)
            rank = torch.where(live & ~lse.isnan(), 1 + larger, 0)
            stats = stats._replace(rank=rank.to(torch.int32))
        if "sum_p2" in statistics:
            stats = stats._replace(sum_p2=p.square().sum(dim=1))
        if "margin" in statistics:
            margin = target_logit - _others(z, index).amax(dim=1)
            stats = stats._replace(margin=torch.where(live, margin, 0))
        if score_ids is not None:
            absent = score_ids == -1
            scores = logp.gather(1, torch.where(absent, 0, score_ids).long())
            stats = stats._replace(score_logp=torch.where(absent, -torch.inf, scores))
        if gold is None:
            return stats
        begin = gold.offsets[gold.problem]
        count = gold.offsets[gold.problem + 1] - begin
        row = torch.repeat_interleave(torch.arange(len(z), device=z.device), count)
        first = torch.cumsum(count, 0) - count
        item = torch.arange(len(row), device=z.device) - first[row] + begin[row]
        picked = z[row, gold.ids.long()[item]]
        gold_logit = torch.zeros_like(lse).index_add(0, row, picked) / count
        return stats._replace(gold_logit=gold_logit, gold_logp=gold_logit - lse)


@_in_float32
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
    statistics: Collection[str] = (),
    score_ids: Tensor | None = None,
) -> TokenStats:
    """See compact_ops.linear_token_stats; head_grad and filter_eps do not change the values."""
    op = "linear_token_stats"
    if rows is not None:
        _values.index(op, "rows", rows, len(hidden))
    _values.index(op, "target", target, len(weight), also=ignore_index)
    if score_ids is not None:
        _values.index(op, "score_ids", score_ids, len(weight), low=-1)
    if gold is not None:
        _values.gold(op, gold, len(weight))
    read = hidden if rows is None else hidden[rows]
    z = _logits(read, weight, bias, softcap, logit_scale)
    return _stats(z, target, gold, ignore_index, statistics, score_ids)


@_in_float32
def accumulate_weighted(
    unit: Tensor, rows: Tensor, weight: Tensor, group: Tensor | None, num_rows: int
) -> Tensor:
    """See compact_ops.accumulate_weighted."""
    op = "accumulate_weighted"
    _values.index(op, "rows", rows, num_rows)
    if group is not None:
        _values.index(op, "group", group, len(weight))
    scale = weight if group is None else weight[group]
    dtype = torch.promote_types(unit.dtype, torch.float32)
    out = torch.zeros(num_rows, unit.shape[1], dtype=dtype, device=unit.device)
    # With weight 0 a token adds nothing, also if its unit gradient is not finite.
    unit = torch.where((scale == 0)[:, None] & ~unit.isfinite(), 0, unit)
    return out.index_add(0, rows, scale[:, None].to(dtype) * unit.to(dtype))


@_in_float32
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
    """See compact_ops.pairwise_symmetric_kl."""
    for name, index in (("left", left), ("right", right)):
        _values.index("pairwise_symmetric_kl", name, index, len(hidden))
    logp = _logits(hidden, weight, bias, softcap, logit_scale).log_softmax(dim=1)
    p, q = logp[left], logp[right]
    # A token that has probability 0 in both (-inf in both) adds nothing. The difference is masked
    # and not the product, whose gradient would be NaN.
    apart = torch.where(p == q, 0, p - q)
    return ((p.exp() - q.exp()) * apart).sum(dim=1)


@_in_float32
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
    """See compact_ops.head_divergence."""
    log_q = _logits(hidden, weight, bias, softcap, logit_scale).log_softmax(dim=1)
    teacher = (teacher_bias, teacher_softcap, teacher_logit_scale)
    with torch.no_grad():
        log_p = _logits(teacher_hidden, teacher_weight, *teacher).log_softmax(dim=1)
        log_p = log_p.to(log_q.dtype)
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (a * torch.where(a == 0, 0, log_a - log_b)).sum(dim=1)

    if kind == "forward":
        return kl(p, log_p, log_q)
    if kind == "reverse":
        return kl(q, log_q, log_p)
    m = mix * p + (1 - mix) * q
    log_m = torch.where(m == 0, 1, m).log()  # not used where it is 0; its gradient would be NaN
    return mix * kl(p, log_p, log_m) + (1 - mix) * kl(q, log_q, log_m)


@_in_float32
def problem_weights(
    scores: Tensor,
    offsets: Tensor,
    beta: Tensor,
    prior_std: Tensor,
    *,
    tau: float = 1.0,
    ddof: int = 0,
    eps: float = 0.0,
    floor: float = 0.0,
) -> ProblemWeights:
    """See compact_ops.problem_weights."""
    op, total = "problem_weights", scores.shape[1]
    _values.index(op, "offsets", offsets, total + 1)
    ends = offsets[[0, -1]].tolist() if len(offsets) else []
    if ends != [0, total]:
        raise RuntimeError(f"{op}: offsets must run from 0 to R = {total}, got {ends}")
    _values.offsets(op, "offsets", offsets, 1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, beta, prior_std = (t.to(dtype) for t in (scores, beta, prior_std))
    parts, standard = [scores.new_empty(0)], [scores.new_empty(len(scores), 0)]
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        s = scores[:, begin:end]
        k = end - begin
        if k == 1:
            parts.append(s.new_ones(1))
            standard.append(torch.zeros_like(s))
            continue
        centred = s - s.mean(dim=1, keepdim=True)
        var = centred.square().sum(dim=1, keepdim=True) / max(k - ddof, 1)
        denominator = var.sqrt() + eps if eps > 0 else (var + prior_std[:, None].square()).sqrt()
        # If all scores are equal, z is 0; they may differ from their rounded mean.
        equal = (s == s[:, :1]).all(dim=1, keepdim=True)
        z = torch.where(equal | (denominator == 0), 0, centred / denominator)
        alpha = torch.softmax((beta[:, None] * z).sum(dim=0) / tau, dim=0)
        parts.append((1 - floor) * alpha + floor / k)
        standard.append(z)
    return ProblemWeights(torch.cat(parts), torch.cat(standard, dim=1))


@_in_float32
def row_stats_(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    gold: GoldAnswers | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """See compact_ops.row_stats_."""
    op, vocabulary = "row_stats_", logits.shape[1]
    _values.index(op, "target", target, vocabulary, also=ignore_index)
    if gold is not None:
        _values.gold(op, gold, vocabulary)
    # Tensors of inference mode cannot be saved for a backward, so it reads copies.
    with torch.inference_mode(False), torch.enable_grad():
        target, raw = target.clone(), logits.detach().clone().requires_grad_()
        bias = None if bias is None else bias.detach().clone()
        stats = _stats(_finish(raw, bias, softcap, logit_scale), target, gold, ignore_index)
        upstream = torch.ones_like(stats.nll) if weight is None else weight.to(stats.nll.dtype)
        (unit,) = torch.autograd.grad(stats.nll, raw, upstream)
    # A row of weight 0 has no gradient, also if its logits are not finite.
    logits.copy_(torch.where(upstream[:, None] == 0, 0, unit))
    return stats._replace(nll=stats.nll.detach())


def rounded_at_random(grad: Tensor, eps: float) -> Tensor:
    """Rounds the small entries of `grad` [R, V] at random to 0 or +-eps; the mean is unchanged.

    An entry g with |g| < eps becomes sign(g) eps if |g| > u eps, and 0 otherwise. u in [0, 1) is a
    hash of the float32 bits of g and of its column (lowbias32, by C. Wellons). So the same input
    always gives the same output, and no random generator is needed. The derivative is taken as 1,
    that of the mean.
    """
    low = 0xFFFFFFFF
    column = torch.arange(grad.shape[1], device=grad.device)
    h = grad.detach().float().contiguous().view(torch.int32).long() & low
    h = h ^ (column * 0x9E3779B1 & low)
    h = (h ^ (h >> 16)) * 0x7FEB352D & low
    h = (h ^ (h >> 15)) * 0x846CA68B & low
    h = h ^ (h >> 16)
    u = (h >> 8).to(grad.dtype) * 2.0**-24
    rounded = torch.where(grad.abs() > u * eps, torch.sign(grad) * eps, 0)
    return torch.where(grad.abs() < eps, rounded + (grad - grad.detach()), grad)


@_in_float32
def filtered_matmul(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See compact_ops.filtered_matmul."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return rounded_at_random(grad.to(dtype), eps) @ weight.to(dtype)


@_in_float32
def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Tensor, scale: float | None = None
) -> Tensor:
    """See `compact_ops.tree_attention`: one mask over every row."""
    _, length, heads, depth = query.shape
    TreeTables.of(parts.cpu(), len(query), length)  # checks the parts
    sees = torch.zeros(len(query), length, length, dtype=torch.bool, device=query.device)
    for row, begin, end, prefix_begin, prefix_end in parts.tolist():
        own = slice(begin, end)
        sees[row, own, own] = torch.ones_like(sees[row, own, own]).tril()
        sees[row, own, prefix_begin:prefix_end] = True
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = heads // key.shape[2]
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (query, key, value))
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    products = (depth**-0.5 if scale is None else scale) * q @ k.mT
    share = products.masked_fill(~sees[:, None], -torch.inf).softmax(dim=-1)
    # The softmax of a token that sees no token is NaN: replace it by 0.
    share = torch.where(sees[:, None].any(dim=-1, keepdim=True), share, 0.0)
    return (share @ v).transpose(1, 2).to(query.dtype)
