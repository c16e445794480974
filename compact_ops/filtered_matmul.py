"""The sparse gradient product: grad @ weight where small entries of grad are skipped."""

from __future__ import annotations

from torch import Tensor

from compact_ops import _check, reference

_OP = "filtered_matmul"


def filtered_matmul(grad: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Grad [R, V] times weight [V, H] with every |grad| < eps taken as 0."""
    _check.tensor(_OP, "grad", grad, _check.FLOATS, ["R", "V"])
    _check.tensor(_OP, "weight", weight, _check.FLOATS, ["V", "H"], V=grad.shape[1])
    return reference.filtered_matmul(grad, weight, eps)
