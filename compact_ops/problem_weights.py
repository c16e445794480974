"""Teacher weights: z-scores within each problem, their weighted sum, a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_fake
from compact_ops.types import ProblemWeights

_OP = "problem_weights"


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
    """Turns the scores of every problem's rationales into weights that sum to 1 per problem.

    For each problem, z = (s - mean) / sqrt(var + prior_std^2), or (s - mean) / (std + eps) if
    eps > 0. Then u = sum over scores of beta * z, alpha = softmax(u / tau), and weight =
    (1 - floor) alpha + floor / K (docs/method.md, "From scores to weights"). K = 1 gives weight 1.
    If all values of a score are equal, z = 0. No gradient flows through the weights.

    Args:
        scores: [S, R] S scores of R rationales; rationales are ordered by problem.
        offsets: [P + 1] int32 or int64, rationales of problem p are offsets[p] : offsets[p + 1];
            every problem has at least one. On CUDA, where the host does not wait to check them,
            rationales that wrong offsets leave out become NaN.
        beta: [S] weight of each score; negative if a small value is good.
        prior_std: [S] in units of the score; its square is added to the variance.
        tau: temperature, > 0.
        ddof: the variance is the sum of squares divided by K - ddof.
        eps: if > 0, it is added to the standard deviation, and prior_std is not used.
        floor: share of the uniform weights in the result, in [0, 1].

    Returns:
        The weights and the z-scores.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
        RuntimeError: offsets are out of range, or a problem has no score.
    """
    _check.tensor(_OP, "scores", scores, _check.FLOATS, ["S", "R"])
    _check.tensor(_OP, "offsets", offsets, _check.INTS, ["P + 1"])
    _check.tensor(_OP, "beta", beta, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.tensor(_OP, "prior_std", prior_std, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.number(_OP, "tau", tau, 0)
    _check.integer(_OP, "ddof", ddof, 0)
    _check.number(_OP, "eps", eps, 0, inclusive=True)
    _check.number(_OP, "floor", floor, 0, inclusive=True)
    if floor > 1:
        raise ValueError(f"{_OP}: floor must be <= 1, got {floor}")
    _check.together(_OP, scores=scores, offsets=offsets, beta=beta, prior_std=prior_std)
    scores = scores.detach()
    if backend() == "reference":
        return reference.problem_weights(
            scores, offsets, beta, prior_std, tau=tau, ddof=ddof, eps=eps, floor=floor
        )
    out = torch.ops.compact.problem_weights(
        scores, offsets.long(), beta.detach(), prior_std.detach(), tau, ddof, eps, floor
    )
    return ProblemWeights(*out)


def _fake(
    scores: Tensor,
    offsets: Tensor,
    beta: Tensor,
    prior_std: Tensor,
    tau: float,
    ddof: int,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    dtype = _check.compute_dtype(scores)
    weight, zscores = (scores.new_empty(s, dtype=dtype) for s in (scores.shape[1:], scores.shape))
    return weight, zscores


register_fake("compact::problem_weights", _fake)
