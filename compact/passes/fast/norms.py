"""RMSNorm with a frozen weight, in a third of the passes over memory; its output is made again.

Every layer that reads a norm's output keeps it for the backward, beside the norm's own input. The
output is one product away from that input, so what is kept instead is how to make it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact.student.internals import Hooks, saved_tensor_hooks, version_of


class Kept:
    """A tensor that the backward needs, and the check that nobody writes to it until then.

    Autograd's own check does not see what hooks have kept, and its own hooks apply in place of
    those around them: so what those would have kept of the tensor is kept here.
    """

    def __init__(self, tensor: Tensor, around: Hooks | None) -> None:
        self.around = around
        # Detached: an operator's output would hold the operator that holds this.
        self.packed = around[0](tensor) if around else tensor.detach()
        self.version = version_of(tensor)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place.
        """
        if self.around:
            return self.around[1](self.packed)
        tensor: Tensor = self.packed
        if version_of(tensor) != self.version:
            raise RuntimeError(
                f"one of the tensors of shape {list(tensor.shape)} that the backward needs was "
                f"changed in place after the forward"
            )
        return tensor


class Recipe:
    """How a norm's output is recomputed: once for consecutive readers."""

    def __init__(self, x: Kept, scale: Tensor, weight: Kept, output: Tensor) -> None:
        self.x, self.scale, self.weight = x, scale, weight
        self.output, self.version = weakref.ref(output), version_of(output)
        self.readers = 0
        self.made: Tensor | None = None

    def make(self) -> Tensor:
        """The output, like x."""
        found = self.made
        if found is None:
            found = (self.x.read() * self.scale).mul_(self.weight.read())
        self.readers -= 1
        self.made = found if self.readers > 0 else None
        return found


class Recipes:
    """The norms' outputs of one forward, by where they lie."""

    def __init__(self) -> None:
        self.at: dict[int, Recipe] = {}
        self.around: Hooks | None = None

    def note(self, x: Tensor, scale: Tensor, weight: Tensor, output: Tensor) -> None:
        """Has `output` = weight * x * scale made again, not kept."""
        if output.is_contiguous():  # else the numbers lie in another order than a reader's view
            kept_x, kept_weight = (Kept(t.detach(), self.around) for t in (x, weight))
            self.at[output.data_ptr()] = Recipe(kept_x, scale, kept_weight, output)

    def pack(self, saved: Tensor) -> Kept | tuple[Recipe, torch.Size]:
        """What autograd keeps of a tensor."""
        recipe = self.at.get(saved.data_ptr())
        output = recipe.output() if recipe else None
        # One that is gone may have left its place to another tensor.
        if (
            recipe is None
            or output is None
            or version_of(output) != recipe.version
            or output.numel() != saved.numel()
            or not saved.is_contiguous()
        ):
            return Kept(saved, self.around)
        recipe.readers += 1
        return recipe, saved.shape

    def unpack(self, packed: Kept | tuple[Recipe, torch.Size]) -> Tensor:
        """The tensor that `pack` was given."""
        if isinstance(packed, Kept):
            return packed.read()
        recipe, shape = packed
        return recipe.make().view(shape)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While it lasts, autograd keeps recipes in place of the outputs that `norm` gives."""
        self.around = saved_tensor_hooks()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self.at.clear()  # autograd holds self.unpack, and so would hold every norm's input


def epsilon(module: nn.Module) -> float | None:
    """The epsilon of a module that is RMSNorm with a frozen weight; None for anything else."""
    weight = getattr(module, "weight", None)
    found = getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or found is None or weight.requires_grad or weight.dim() != 1:
        return None
    kind: Any = type(module)  # mypy takes no class for hashable
    return found if _is_rms_norm(kind) else None


def takes_one(kind: type[nn.Module]) -> bool:
    """Whether this class's forward has one argument, and none that may be left out."""
    return len(inspect.signature(kind.forward).parameters) == 2


@lru_cache(maxsize=256)
def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether this class computes weight * x / sqrt(mean(x^2) + epsilon), tried out on numbers."""
    if not takes_one(kind):
        return False
    x = torch.linspace(-2, 3, 16).view(2, 8)
    weight = torch.linspace(0.5, 2, 8)
    try:
        found = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=0.5), x)
    except Exception:  # it needs more than that, so it does something else
        return False
    wanted = weight * x * (x.square().mean(dim=-1, keepdim=True) + 0.5).rsqrt()
    return isinstance(found, Tensor) and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def norm(recipes: Recipes, module: nn.Module, eps: float, x: Tensor) -> Tensor:
    """What `module`, for which `epsilon` gave eps, makes of x [..., H]."""
    weight: Any = module.weight
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        plain: Tensor = type(module).forward(module, x)
        return plain
    made: tuple[Tensor, Tensor] = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    output, scale = made
    if torch.is_grad_enabled():
        recipes.note(x, scale, weight, output)
    return output


class _Norm(torch.autograd.Function):
    """weight * x * scale, and scale [..., 1] = 1 / sqrt(mean(x^2) + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return (x * scale).mul_(weight), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad = grad * weight
        along = (grad * x).sum(dim=-1, keepdim=True)
        along.mul_(scale).mul_(scale).mul_(scale).mul_(-1 / x.shape[-1])
        return grad.mul_(scale).addcmul_(x, along), None, None
