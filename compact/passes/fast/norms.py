"""RMSNorm with a frozen weight, in a third of the passes over memory; its output is recomputed.

Every layer that reads the output of a norm saves it for the backward, and the norm saves its own
input. One product gives the output from the input, so the backward recomputes the output and only
the input is saved.
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
    """A tensor saved for the backward. It checks that the tensor was not changed in place.

    Autograd's own check does not cover tensors that hooks have saved. Autograd also calls only the
    innermost hooks, so this class calls the hooks around them (`around`).
    """

    def __init__(self, tensor: Tensor, around: Hooks | None) -> None:
        self.around = around
        # Detached: an output refers to its operator, and the operator refers to this object.
        self.packed = around[0](tensor) if around else tensor.detach()
        self.version = version_of(tensor)

    def read(self) -> Tensor:
        """Returns the tensor.

        Raises:
            RuntimeError: it was changed in place after the forward.
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


class NormOutput:
    """The output of a norm, recomputed when it is read: once for consecutive readers."""

    def __init__(self, x: Kept, scale: Tensor, weight: Kept, output: Tensor) -> None:
        self.x, self.scale, self.weight = x, scale, weight
        self.output, self.version = weakref.ref(output), version_of(output)
        self.readers = 0
        self.made: Tensor | None = None

    def make(self) -> Tensor:
        """Returns the output, of the shape and dtype of x."""
        found = self.made
        if found is None:
            found = (self.x.read() * self.scale).mul_(self.weight.read())
        self.readers -= 1
        self.made = found if self.readers > 0 else None
        return found


class NormOutputs:
    """The outputs of the norms of one forward, by their address."""

    def __init__(self) -> None:
        self.at: dict[int, NormOutput] = {}
        self.around: Hooks | None = None

    def note(self, x: Tensor, scale: Tensor, weight: Tensor, output: Tensor) -> None:
        """Marks `output` = weight * x * scale to be recomputed and not saved."""
        if output.is_contiguous():  # otherwise a reader's view may have another order
            kept_x, kept_weight = (Kept(t.detach(), self.around) for t in (x, weight))
            self.at[output.data_ptr()] = NormOutput(kept_x, scale, kept_weight, output)

    def pack(self, saved: Tensor) -> Kept | tuple[NormOutput, torch.Size]:
        """Returns what autograd saves in place of a tensor."""
        source = self.at.get(saved.data_ptr())
        output = source.output() if source else None
        # If the output was freed, another tensor may have its address.
        if (
            source is None
            or output is None
            or version_of(output) != source.version
            or output.numel() != saved.numel()
            or not saved.is_contiguous()
        ):
            return Kept(saved, self.around)
        source.readers += 1
        return source, saved.shape

    def unpack(self, packed: Kept | tuple[NormOutput, torch.Size]) -> Tensor:
        """Returns the tensor that `pack` was given."""
        if isinstance(packed, Kept):
            return packed.read()
        source, shape = packed
        return source.make().view(shape)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the context, autograd recomputes the outputs of `norm` and does not save them."""
        self.around = saved_tensor_hooks()
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self.at.clear()  # autograd refers to self.unpack, and so to the input of every norm


def epsilon(module: nn.Module) -> float | None:
    """Returns the epsilon of an RMSNorm with a frozen weight [H]; None for any other module."""
    found = module.__dict__.get("variance_epsilon")  # most modules have none
    weight = getattr(module, "weight", None) if found is not None else None
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.dim() != 1:
        return None
    kind: Any = type(module)  # mypy does not see that classes can be hashed
    return found if _is_rms_norm(kind) else None


def takes_one(kind: type[nn.Module]) -> bool:
    """Whether the forward of this class has exactly one argument, besides self."""
    return len(inspect.signature(kind.forward).parameters) == 2


@lru_cache(maxsize=256)
def _is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether this class computes weight * x / sqrt(mean(x^2) + epsilon), tested on numbers."""
    if not takes_one(kind):
        return False
    x = torch.linspace(-2, 3, 16).view(2, 8)
    weight = torch.linspace(0.5, 2, 8)
    try:
        found = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=0.5), x)
    except Exception:  # it needs more than these two, so it computes something else
        return False
    wanted = weight * x * (x.square().mean(dim=-1, keepdim=True) + 0.5).rsqrt()
    return isinstance(found, Tensor) and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def norm(outputs: NormOutputs, module: nn.Module, eps: float, x: Tensor) -> Tensor:
    """Returns the output [..., H] of `module` for x [..., H]; `epsilon(module)` gave eps."""
    weight: Any = module.weight
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        plain: Tensor = type(module).forward(module, x)
        return plain
    made: tuple[Tensor, Tensor] = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    output, scale = made
    if torch.is_grad_enabled():
        outputs.note(x, scale, weight, output)
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
