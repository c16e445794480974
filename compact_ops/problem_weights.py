"""Teacher weights: z-scores within each problem, their weighted sum, a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_ops import _check, reference
from compact_ops._library import backend, register_fake

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
) -> Tensor:
    """Turns the scores of every problem's rationales into weights that sum to 1 per problem.

    Per problem, z = (s - mean) / sqrt(var + prior_std^2), or (s - mean) / (std + eps) where eps >
    0; u = sum over scores of beta * z; alpha = softmax(u / tau); weight = (1 - floor) alpha +
    floor / K (docs/method.md, "From scores to weights"). K = 1 gives 1. Scores that are all
    equal have z = 0. No gradient flows through the weights.

    Args:
        scores: [S, R] S scores of R rationales, rationales ordered by problem.
        offsets: [P + 1] int32 or int64, rationales of problem p are offsets[p] : offsets[p + 1], at
            least one each.
        beta: [S] weight of each score; negative where small is good.
        prior_std: [S] added in quadrature to the standard deviation, in units of the score.
        tau: temperature, > 0.
        ddof: the variance divides by K - ddof.
        eps: where > 0, added to the standard deviation, and prior_std is not used.
        floor: share of uniform weights mixed in, in [0, 1].

    Returns:
        [R] float32 (float64 for float64 `scores`).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.
    """
    _check.tensor(_OP, "scores", scores, _check.FLOATS, ["S", "R"])
    _check.tensor(_OP, "offsets", offsets, _check.INTS, ["P + 1"])
    _check.tensor(_OP, "beta", beta, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.tensor(_OP, "prior_std", prior_std, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.number(_OP, "tau", tau, 0, inclusive=False)
    _check.number(_OP, "ddof", ddof, 0, inclusive=True)
    _check.number(_OP, "eps", eps, 0, inclusive=True)
    _check.number(_OP, "floor", floor, 0, inclusive=True)
    if floor > 1:
        raise ValueError(f"{_OP}: floor must be <= 1, got {floor}")
    _check.same_device(_OP, scores=scores, offsets=offsets, beta=beta, prior_std=prior_std)
    scores = scores.detach()
    if backend() == "reference":
        return reference.problem_weights(
            scores, offsets, beta, prior_std, tau=tau, ddof=ddof, eps=eps, floor=floor
        )
    out: Tensor = torch.ops.compact.problem_weights(
        scores, offsets.long(), beta.detach(), prior_std.detach(), tau, ddof, eps, floor
    )
    return out


def _fake(
    scores: Tensor,
    offsets: Tensor,
    beta: Tensor,
    prior_std: Tensor,
    tau: float,
    ddof: int,
    eps: float,
    floor: float,
) -> Tensor:
    return scores.new_empty((scores.shape[1],), dtype=_check.compute_dtype(scores))


register_fake("compact::problem_weights", _fake)
