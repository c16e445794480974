"""The divergence of two models' heads: every kind, any shape, two widths, memory, errors."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from compact_ops import head_divergence, pairwise_symmetric_kl, reference
from compact_ops.head_divergence import KINDS
from compact_ops.testing import check, head_terms


def _inputs(rows: int, width: int, other: int, vocabulary: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(rows, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "teacher_hidden": torch.randn(rows, other, generator=g, dtype=torch.float64),
        "teacher_weight": torch.randn(vocabulary, other, generator=g, dtype=torch.float64),
    }


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(1, 600),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(
    rows: int, width: int, other: int, vocabulary: int, kind: str, terms: bool, seed: int
) -> None:
    inputs = _inputs(rows, width, other, vocabulary, seed) | {"kind": kind, "mix": 0.3}
    if terms:
        own = head_terms(vocabulary)
        inputs |= own | {f"teacher_{name}": value for name, value in own.items()}
    check("head_divergence", inputs, ulps=512)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind: str) -> None:
    inputs = _inputs(5, 4, 3, 40, 1) | head_terms(40) | {"kind": kind}
    leaves = ("hidden", "weight", "bias")
    values = tuple(inputs[name].clone().requires_grad_() for name in leaves)

    def value(*given: torch.Tensor) -> torch.Tensor:
        return head_divergence(**inputs | dict(zip(leaves, given, strict=True)))

    assert torch.autograd.gradcheck(value, values)


def test_forward_plus_reverse_is_the_symmetric_divergence() -> None:
    """With one head for both models it is what pairwise_symmetric_kl computes."""
    inputs = _inputs(6, 8, 8, 300, 2)
    weight = inputs["weight"]
    both = sum(
        head_divergence(inputs["hidden"], weight, inputs["teacher_hidden"], weight, kind=kind)
        for kind in ("forward", "reverse")
    )
    states = torch.cat([inputs["hidden"], inputs["teacher_hidden"]])
    left, right = torch.arange(6), torch.arange(6, 12)
    torch.testing.assert_close(both, pairwise_symmetric_kl(states, weight, left, right))


@pytest.mark.parametrize("whose", ["hidden", "teacher_hidden"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_nan_is_seen(kind: str, whose: str) -> None:
    inputs = _inputs(3, 4, 4, 40, 7) | {"kind": kind}
    inputs[whose][1] = torch.nan
    hidden = inputs["hidden"].requires_grad_()
    for function in (head_divergence, reference.head_divergence):
        found = function(**inputs)
        (grad,) = torch.autograd.grad(found.sum(), hidden)
        assert found.isnan().tolist() == grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_0_adds_nothing(kind: str, trains_head: bool) -> None:
    """Also if its logits overflow: the gradients are those without the row."""
    inputs = _inputs(4, 3, 3, 40, 7)
    inputs["hidden"][1] = 1e308
    leaves = ("hidden", "weight") if trains_head else ("hidden",)
    upstream = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    keep = torch.tensor([0, 2, 3])
    found = []
    for function, rows in ((head_divergence, slice(None)), (reference.head_divergence, keep)):
        given = inputs | {n: inputs[n][rows] for n in ("hidden", "teacher_hidden")}
        wanted = [given[name].requires_grad_() for name in leaves]
        value = function(**given, kind=kind)
        found.append(list(torch.autograd.grad(value, wanted, upstream[rows])))
    assert found[0][0][1].tolist() == [0, 0, 0]
    found[0][0] = found[0][0][keep]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_both_exclude(kind: str) -> None:
    """A bias of -inf removes a token, in the gradients too."""
    bias = torch.zeros(60, dtype=torch.float64)
    bias[10:50:3] = -torch.inf
    inputs = _inputs(6, 8, 8, 60, 8) | {"kind": kind, "bias": bias, "teacher_bias": bias}
    found = check("head_divergence", inputs, ulps=512)
    assert all(bool(x.isfinite().all()) for x in found.values())


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_needed(trained: str) -> None:
    """The backward makes no other, and one tensor of the size of the head."""
    inputs = _inputs(6, 5, 4, 300, 9)
    numbers = (0, 0.5, 0.0, 1.0, 0.0, 1.0)
    own = (inputs["hidden"], inputs["weight"], torch.zeros(300, dtype=torch.float64))
    args = (torch.ones(6).double(), *own, inputs["teacher_hidden"], inputs["teacher_weight"], None)
    needs = [name == trained for name in ("hidden", "weight", "bias")]
    backward = sys.modules["compact_ops.head_divergence"]._backward_op._init_fn
    with _Heads(300 * 5) as heads:
        found = backward(*args, *numbers, *needs)
    assert [x.numel() > 0 for x in found] == needs
    assert len(heads.storages) == (trained == "weight")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence(kind: str) -> None:
    inputs = {k: v.float() for k, v in _inputs(6, 8, 8, 300, 3).items()}
    hidden = inputs["hidden"].requires_grad_()
    same = (inputs["hidden"].detach(), inputs["weight"])
    found = head_divergence(hidden, inputs["weight"], *same, kind=kind)
    found.sum().backward()
    assert float(found.detach().abs().max()) < 2e-6 and float(hidden.grad.abs().max()) < 2e-6


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_there_is_no_second_derivative(trained: str) -> None:
    inputs = _inputs(6, 8, 8, 300, 5)
    inputs["hidden"].requires_grad_()
    inputs[trained].requires_grad_()
    found = head_divergence(**inputs).square().sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(found, inputs["hidden"], create_graph=True)


def test_rows_do_not_depend_on_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(9, 8, 8, 300, 6)
    inputs["hidden"].requires_grad_()
    whole = head_divergence(**inputs)
    (wanted,) = torch.autograd.grad(whole.sum(), inputs["hidden"])
    monkeypatch.setattr(sys.modules["compact_ops.head_divergence"], "_BLOCK", 2 * 300)
    monkeypatch.setattr(sys.modules["compact_ops.head_divergence"], "_SLICE", 100)
    parts = head_divergence(**inputs)
    torch.testing.assert_close(parts, whole)
    (found,) = torch.autograd.grad(parts.sum(), inputs["hidden"])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("vocabulary", "on_gpu", "size"),
    [(151_936, False, 27), (151_936, True, 441), (1 << 27, True, 1)],
)
def test_blocks_of_a_gpu_are_larger(vocabulary: int, on_gpu: bool, size: int) -> None:
    blocks = sys.modules["compact_ops.head_divergence"]._blocks(1000, vocabulary, on_gpu=on_gpu)
    assert next(blocks) == slice(0, size)


class _Heads(TorchDispatchMode):
    """The storages of all tensors of a size that ops make; kept, so that none is used twice."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.storages, self.kept = size, set[int](), list[torch.Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.kept.append(out)
            self.storages |= {out.untyped_storage().data_ptr()} - given
        return out


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an op returns."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return out


def test_no_row_of_the_whole_vocabulary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows of 5,000 entries, four at a time: no tensor is larger than a head."""
    monkeypatch.setattr(sys.modules["compact_ops.head_divergence"], "_BLOCK", 4 * 5000)
    inputs = {k: v.float() for k, v in _inputs(64, 4, 6, 5000, 4).items()}
    inputs["hidden"].requires_grad_()
    with _Largest() as largest:
        head_divergence(**inputs).sum().backward()
    assert largest.most <= 5000 * 6 < 64 * 5000


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kind": "l2"}, ValueError, "kind must be one of forward, reverse, jsd"),
        ({"mix": 1.0}, ValueError, "mix must be between 0 and 1"),
        ({"mix": "half"}, TypeError, "mix must be a number"),
        ({"teacher_logit_scale": torch.inf}, ValueError, "teacher_logit_scale must be finite"),
        ({"teacher_hidden": torch.zeros(5, 3)}, ValueError, "teacher_hidden must have shape"),
        ({"teacher_weight": torch.zeros(29, 3)}, ValueError, "teacher_weight must have shape"),
        ({"teacher_weight": torch.zeros(30, 4)}, ValueError, "teacher_weight must have shape"),
        ({"teacher_bias": torch.zeros(29)}, ValueError, "teacher_bias must have shape"),
        ({"teacher_softcap": 0.0}, ValueError, "teacher_softcap must be > 0"),
        ({"hidden": torch.zeros(6, 8).long()}, TypeError, "hidden must have dtype"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^head_divergence: {message}.*got"):
        head_divergence(**_inputs(6, 8, 3, 30, 0) | change)
