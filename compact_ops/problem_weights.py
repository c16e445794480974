"""Teacher weights: z-scores within each problem, their weighted sum, a softmax."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference

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
    """Softmax over each problem of (sum of beta * z-score) / tau, mixed with uniform by floor."""
    _check.tensor(_OP, "scores", scores, _check.FLOATS, ["S", "R"])
    _check.tensor(_OP, "offsets", offsets, _check.INTS, ["P + 1"])
    _check.tensor(_OP, "beta", beta, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.tensor(_OP, "prior_std", prior_std, _check.FLOATS, ["S"], S=scores.shape[0])
    _check.number(_OP, "tau", tau, 0, inclusive=False)
    return reference.problem_weights(
        scores, offsets, beta, prior_std, tau=tau, ddof=ddof, eps=eps, floor=floor
    )
