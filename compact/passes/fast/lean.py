"""Runs frozen layers with LoRA in fewer passes over memory, with the same result.

peft adds the output of LoRA with three operations, each of which writes a tensor of the layer's
output size. A gated MLP saves four tensors of its inner width for the backward, although two of
them follow from the other two. `lean` replaces these forwards: the output of LoRA is added inside
the matrix product, and the two tensors are recomputed in the backward. It also replaces the forward
of RMSNorm (norms.py). All other layers keep their own forward: those with another kind of adapter,
a quantised base, hooks or mixed dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from compact.passes.fast.norms import NormOutputs, epsilon, norm, takes_one
from compact.passes.fast.products import product
from compact.student import autocast_dtype
from compact.student.internals import (
    has_child,
    has_hooks,
    is_checkpointed,
    is_compiled,
    is_sharded,
    version_of,
)

Activation = Callable[[Tensor], Tensor]
_WITH_GATE = "up_proj", "down_proj", "act_fn"
_CASTS: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
"""Frozen weights under autocast: their version, and what they are in its dtype."""


class _Adapted(NamedTuple):
    """A frozen linear layer [I] -> [O] with LoRA: y = x W^T + bias + scaling (drop(x) A^T) B^T."""

    weight: Tensor  # [O, I]
    bias: Tensor | None  # [O]
    a: Tensor  # [r, I]
    b: Tensor  # [O, r]
    scaling: float
    dropout: float  # probability; 0 outside training


@contextmanager
def lean(body: nn.Module) -> Iterator[None]:
    """Within the context, plain LoRA layers and norms of `body` use memory-saving forwards.

    A body stays unchanged under autocast on a GPU, and if it is compiled or sharded. It also stays
    unchanged with gradient checkpointing: there a layer runs again after the context has ended, and
    both runs must save the same tensors. Under autocast on a CPU, products have the same dtype as
    without the context; a frozen weight is cast once, not in each forward.
    """
    changed: list[nn.Module] = []
    outputs = NormOutputs()
    try:
        for module, forward in _replacements(body, outputs):
            module.__dict__["forward"] = forward
            changed.append(module)
        with outputs.kept() if changed else nullcontext():
            yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


Forward = Callable[[Tensor], Tensor]


def _replacements(body: nn.Module, outputs: NormOutputs) -> list[tuple[nn.Module, Forward]]:
    """Returns the modules to change, each with its new forward; none if the body stays as it is.

    It does not look inside a module that it changes: with peft a layer has ten modules of its own,
    and the walk is made in every pass.
    """
    if torch.is_autocast_enabled("cuda"):
        return []
    found: list[tuple[nn.Module, Forward]] = []
    todo, seen = [body], {body}
    while todo:
        module = todo.pop()
        if is_checkpointed(module) or is_sharded(module) or is_compiled(module):
            return []
        forward = _leaner(module, outputs)
        if forward is not None:
            found.append((module, forward))
            continue
        inner = [child for child in module.children() if child not in seen]
        todo += inner[::-1]
        seen.update(inner)
    return found


def _leaner(module: nn.Module, outputs: NormOutputs) -> Forward | None:
    """Returns the new forward of a module; None to keep its own."""
    if has_child(module, "gate_proj") and all(map(partial(hasattr, module), _WITH_GATE)):
        gate, up, down = (
            _adapted(getattr(module, n)) for n in ("gate_proj", "up_proj", "down_proj")
        )
        kind: Any = type(module)  # mypy does not see that classes can be hashed
        activation: Any = module.act_fn
        if gate and up and down and _untouched(module) and _is_gated(kind, activation):
            return partial(_gated, gate, up, down, activation)
    elif (at := _adapted(module)) is not None:
        return partial(_line, at)
    elif (eps := epsilon(module)) is not None and _untouched(module):
        return partial(norm, outputs, module, eps)
    return None


def _untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else."""
    return not ("forward" in module.__dict__ or has_hooks(module) or is_compiled(module))


@lru_cache(maxsize=256)
def _is_gated(kind: type[nn.Module], activation: Activation) -> bool:
    """Whether this class computes down(activation(gate(x)) * up(x)), tested on numbers."""
    if not takes_one(kind):
        return False
    parts = SimpleNamespace(
        gate_proj=lambda x: x * 2,
        up_proj=lambda x: x + 3,
        down_proj=lambda x: x - 5,
        act_fn=activation,
    )
    x = torch.linspace(-2, 2, 9)
    try:
        found = kind.forward(parts, x)
    except Exception:  # it needs more than these four parts, so it computes something else
        return False
    return isinstance(found, Tensor) and torch.equal(found, activation(x * 2) * (x + 3) - 5)


@lru_cache(maxsize=256)
def _is_lora(kind: type) -> bool:
    # Compared by name, so that peft need not be imported.
    return f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.Linear"


def _adapted(module: nn.Module | None) -> _Adapted | None:
    """Returns the parts of a linear layer with one plain LoRA; None for any other module."""
    kind: Any = type(module)
    if not _is_lora(kind):
        return None
    layer: Any = module
    of_a = layer.lora_A  # each read of a child or parameter takes a while
    active = [name for name in layer.active_adapters if name in of_a]
    if layer.disable_adapters or layer.merged or len(active) != 1 or layer.lora_variant:
        return None
    name = active[0]
    base, down, up = layer.base_layer, of_a[name], layer.lora_B[name]
    drop = layer.lora_dropout[name]
    if not (
        type(base) is type(down) is type(up) is nn.Linear
        and type(drop) in (nn.Identity, nn.Dropout)
        and all(map(_untouched, (layer, base, down, up, drop)))
        and down.bias is None
        and up.bias is None
    ):
        return None
    weight, bias, a, b = base.weight, base.bias, down.weight, up.weight
    if (
        weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or not weight.dtype == a.dtype == b.dtype
    ):
        return None
    p = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
    if (dtype := autocast_dtype("cpu")) is not None and weight.dtype == torch.float32:
        weight, bias = _cast(weight, dtype), None if bias is None else bias.to(dtype)
        a, b = a.to(dtype), b.to(dtype)
    return _Adapted(weight, bias, a, b, layer.scaling[name], p)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a frozen weight in another dtype, cast again only after it was changed."""
    version, found = _CASTS.get(weight, (None, None))
    if found is None or found.dtype != dtype or version != version_of(weight):
        version, found = version_of(weight), weight.detach().to(dtype)
        _CASTS[weight] = version, found
    return found


def _read(x: Tensor, at: _Adapted) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs one adapted layer on rows x [N, I].

    Returns:
        y [N, O], the inner state of LoRA [N, r], and the mask of the inputs that dropout kept
        ([N, I] bool; None without dropout).
    """
    kept = None
    if at.dropout > 0:
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - at.dropout)
    inner = _dropped(x, kept, at.dropout) @ at.a.T
    y = product(x, at.weight, at.bias)
    return y.addmm_(inner, at.b.T, alpha=at.scaling), inner, kept


def _dropped(x: Tensor, kept: Tensor | None, p: float) -> Tensor:
    return x if kept is None else (x * kept).mul_(1 / (1 - p))


def _unread(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    kept: Tensor | None,
    at: _Adapted,
    into: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Backward of `_read`.

    Args:
        grad: [N, O] gradient of y.
        x: [N, I] the input of `_read`.
        inner: [N, r] as `_read` returned it.
        kept: [N, I] or None, as `_read` returned it.
        at: the layer.
        into: [N, I] gradient of x from another layer, or None. The gradient of x is added to it in
            place.
        need_x: whether x requires a gradient.

    Returns:
        Gradients of x [N, I] (None unless `need_x`), A [r, I] and B [O, r].
    """
    grad_b = (grad.T @ inner).mul_(at.scaling)
    grad_inner = (grad @ at.b).mul_(at.scaling)
    grad_a = grad_inner.T @ _dropped(x, kept, at.dropout)
    if not need_x:
        return None, grad_a, grad_b
    grad_x = product(grad, at.weight.T)
    if into is not None:
        grad_x = into.add_(grad_x)
    if kept is None:
        grad_x.addmm_(grad_inner, at.a)
    else:
        grad_x.add_(_dropped(grad_inner @ at.a, kept, at.dropout))
    return grad_x, grad_a, grad_b


def _line(at: _Adapted, x: Tensor) -> Tensor:
    x = x.to(at.weight.dtype)
    y: Tensor = _Line.apply(x, at.a, at.b, at)  # type: ignore[no-untyped-call]
    return y


def _gated(
    gate: _Adapted, up: _Adapted, down: _Adapted, activation: Activation, x: Tensor
) -> Tensor:
    x = x.to(gate.weight.dtype)
    y: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        x, gate.a, gate.b, up.a, up.b, down.a, down.b, gate, up, down, activation
    )
    return y


class _Line(torch.autograd.Function):
    """One adapted layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, at: _Adapted) -> Tensor:
        y, inner, kept = _read(x.flatten(0, -2), at)
        ctx.save_for_backward(x, inner, kept, at.weight, a, b)
        ctx.numbers = at.scaling, at.dropout
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, inner, kept, weight, a, b = ctx.saved_tensors
        at = _Adapted(weight, None, a, b, *ctx.numbers)
        grad_x, grad_a, grad_b = _unread(
            grad.flatten(0, -2), x.flatten(0, -2), inner, kept, at, None, ctx.needs_input_grad[0]
        )
        return None if grad_x is None else grad_x.view_as(x), grad_a, grad_b, None


class _Gated(torch.autograd.Function):
    """down(activation(gate(x)) * up(x)) of three adapted layers; saves the outputs gate, up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_a: Tensor,
        gate_b: Tensor,
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
        gate_at: _Adapted,
        up_at: _Adapted,
        down_at: _Adapted,
        activation: Activation,
    ) -> Tensor:
        flat = x.flatten(0, -2)
        gate, *gate_kept = _read(flat, gate_at)
        up, *up_kept = _read(flat, up_at)
        active = activation(gate)
        # In place, unless the activation returned its input. A temporary tensor that is allocated
        # between two saved ones would fragment memory.
        inner = active * up if active.data_ptr() == gate.data_ptr() else active.mul_(up)
        y, *down_kept = _read(inner, down_at)
        layers = gate_at, up_at, down_at
        ctx.save_for_backward(
            x, gate, up, *gate_kept, *up_kept, *down_kept,
            *(t for at in layers for t in (at.weight, at.a, at.b)),
        )  # fmt: skip
        ctx.numbers = [(at.scaling, at.dropout) for at in layers]
        ctx.activation = activation
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, gate, up, *rest = ctx.saved_tensors
        gate_inner, gate_kept, up_inner, up_kept, down_inner, down_kept, *tensors = rest
        gate_at, up_at, down_at = (
            _Adapted(tensors[3 * i], None, *tensors[3 * i + 1 : 3 * i + 3], *ctx.numbers[i])
            for i in range(3)
        )
        flat = x.flatten(0, -2)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.activation(gate)
        seen = active.detach()
        grad_product, *grad_down = _unread(
            grad.flatten(0, -2), seen * up, down_inner, down_kept, down_at, None, True
        )
        assert grad_product is not None
        grad_up = grad_product * seen
        (grad_gate,) = torch.autograd.grad(active, gate, grad_product.mul_(up))
        need_x = ctx.needs_input_grad[0]
        grad_x, *from_gate = _unread(grad_gate, flat, gate_inner, gate_kept, gate_at, None, need_x)
        grad_x, *from_up = _unread(grad_up, flat, up_inner, up_kept, up_at, grad_x, need_x)
        grad_x = None if grad_x is None else grad_x.view_as(x)
        return grad_x, *from_gate, *from_up, *grad_down, None, None, None, None
