"""Difficulty as the learning cost of a rationale, from the activations that SCAS reads.

The formula is that of `scas-final`. The activations are the output of up_proj in the last layer, as
published. No pass keeps them, so the body of the student runs again: the metric costs about as much
as the forward. Source: SCAS (arXiv 2605.26872), with its lambda of 0.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compact.metrics import TOKEN_MEAN, register
from compact.metrics.scas_final import learning_cost
from compact.passes import Pass
from compact.passes.forward import token_states


@register("scas", axis="difficulty", aggregation=TOKEN_MEAN, runs_student=True)
def scas(pass_: Pass) -> Tensor:
    """Returns [R] learning cost in squared nats.

    Raises:
        ValueError: the student has no module up_proj.
    """
    found = [m for n, m in pass_.student.body.named_modules() if n.split(".")[-1] == "up_proj"]
    if not found:
        raise ValueError(
            "scas: student must have modules up_proj, "
            f"{type(pass_.student.body).__name__} has none; use scas-final"
        )
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept.append(output.detach())

    lock = found[-1].register_forward_hook(keep)
    try:
        token_states(pass_.student, replace(pass_.batch, leaves=None))
    finally:
        lock.remove()
    return learning_cost(pass_, kept[0])
