"""Lean RMSNorm: the module's own numbers, its output made again, and never a stale one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from compact.passes.fast.norms import NormOutputs, epsilon, norm


def frozen(kind: type[nn.Module] = LlamaRMSNorm, width: int = 12) -> nn.Module:
    module = kind(width, 0.1).requires_grad_(False)
    torch.manual_seed(0)
    nn.init.uniform_(module.weight, 0.5, 2)
    return module


def gradients(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of two layers that read the norm's output, and of its input."""
    torch.manual_seed(1)
    readers = torch.randn(2, 5, x.shape[-1], dtype=x.dtype).requires_grad_()
    output = function(x)
    loss = sum((output @ reader.T).square().sum() for reader in readers.unbind())
    return list(torch.autograd.grad(loss, [x, readers]))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_module(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = frozen(kind).to(dtype)
    x = torch.randn(2, 7, 12, dtype=dtype).requires_grad_()
    eps = epsilon(module)
    assert eps == 0.1
    outputs = NormOutputs()
    with outputs.kept():
        got = gradients(lambda x: norm(outputs, module, eps, x), x)
        assert bool(outputs.at) == (dtype != torch.bfloat16)  # that one is the module's own
    for one, two in zip(got, gradients(module, x), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_gradient_against_differences() -> None:
    module = frozen().double()
    x = torch.randn(3, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm(NormOutputs(), module, 0.1, x), x)


def test_what_is_not_that_norm_is_left_alone() -> None:
    assert epsilon(frozen(Gemma2RMSNorm)) is None  # 1 + weight
    assert epsilon(LlamaRMSNorm(12, 0.1)) is None  # trained
    assert epsilon(nn.LayerNorm(12).requires_grad_(False)) is None
    assert epsilon(nn.Linear(3, 4)) is None
    other = type("Doubled", (LlamaRMSNorm,), {"forward": lambda self, x: 2 * self.weight * x})
    assert epsilon(frozen(other)) is None

    def forward(self: nn.Module, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return LlamaRMSNorm.forward(self, x if gate is None else x * gate)

    assert epsilon(frozen(type("Gated", (LlamaRMSNorm,), {"forward": forward}))) is None


def read(output: Tensor) -> Tensor:
    """A layer that keeps the norm's output for its backward."""
    weight = torch.ones(4, 12).requires_grad_()
    return torch.autograd.grad((output @ weight.T).sum(), weight)[0][0]


def test_the_output_is_not_kept() -> None:
    """Two readers, one output made again, and nothing of it left afterwards."""
    module, outputs = frozen(), NormOutputs()
    x = torch.randn(7, 12).requires_grad_()
    weights = torch.ones(2, 4, 12).requires_grad_()
    with outputs.kept():
        output = norm(outputs, module, 0.1, x)
        (source,) = outputs.at.values()
        loss = sum((output @ w.T).sum() for w in weights)
        assert source.readers == 2
        want = output.detach().sum(0)
        del output
    assert source.output() is None
    loss.backward()
    torch.testing.assert_close(weights.grad, want.expand(2, 4, 12))
    assert source.readers == 0 and source.made is None


def test_a_changed_output_is_kept_as_it_is() -> None:
    module, outputs = frozen(), NormOutputs()
    x = torch.randn(7, 12)
    with outputs.kept():
        output = norm(outputs, module, 0.1, x)
        output.mul_(3)
        got = read(output)
    torch.testing.assert_close(got, output.sum(0))


def test_a_place_taken_by_another_tensor_is_not_mistaken() -> None:
    module, outputs = frozen(), NormOutputs()
    with outputs.kept():
        output = norm(outputs, module, 0.1, torch.randn(7, 12))
        place = output.data_ptr()
        other = torch.randn(7, 12)
        outputs.at[other.data_ptr()] = outputs.at.pop(place)
        del output
        got = read(other)
    torch.testing.assert_close(got, other.sum(0))


def test_backward_twice() -> None:
    """With retain_graph the output is made once more."""
    module, outputs = frozen(), NormOutputs()
    weight = torch.ones(4, 12).requires_grad_()
    with outputs.kept():
        output = norm(outputs, module, 0.1, torch.randn(7, 12))
        loss = (output @ weight.T).sum()
    for _ in range(2):
        (got,) = torch.autograd.grad(loss, weight, retain_graph=True)
        torch.testing.assert_close(got[0], output.sum(0))


@pytest.mark.parametrize("place", ["the norm's input", "another tensor"])
def test_a_change_before_the_backward_is_told(place: str) -> None:
    """As autograd tells it where no hooks keep its tensors."""
    module, outputs = frozen(), NormOutputs()
    weight = torch.ones(4, 12).requires_grad_()
    x = torch.randn(7, 12)
    with outputs.kept():
        loss = (norm(outputs, module, 0.1, x) @ weight.T).square().sum()
        seen = x * 2
        loss = loss + (seen @ weight.T).sum()
    (x if place == "the norm's input" else seen).mul_(3)
    with pytest.raises(RuntimeError, match=r"shape \[7, 12\] .* changed in place"):
        loss.backward()


def test_an_output_that_lies_in_another_order_is_kept_as_it_is() -> None:
    """Queries are normed by head and read by token; here there are as many heads as tokens."""
    module, outputs = frozen(), NormOutputs()
    by_head = torch.randn(2, 5, 5, 12).transpose(1, 2)
    weight = torch.ones(2, 5, 5, 12).requires_grad_()
    with outputs.kept():
        by_token = norm(outputs, module, 0.1, by_head).transpose(1, 2)
        assert by_token.is_contiguous()
        (by_token * weight).sum().backward()
    torch.testing.assert_close(weight.grad, by_token)


def test_hooks_around_get_what_is_kept() -> None:
    """As for offloading, or `compact doctor`: everything but the output, and never the output."""
    module, outputs = frozen(), NormOutputs()
    weight, x = torch.randn(4, 12).requires_grad_(), torch.randn(7, 12).requires_grad_()
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]), outputs.kept():
        output = norm(outputs, module, 0.1, x)
        loss = (output @ weight.T).square().sum()
    got = torch.autograd.grad(loss, [x, weight])
    want = torch.autograd.grad((module(x) @ weight.T).square().sum(), [x, weight])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    def is_there(tensor: Tensor) -> bool:
        return any(t.shape == tensor.shape and torch.equal(t, tensor) for t in packed)

    assert is_there(x) and is_there(weight.T) and not is_there(output)
