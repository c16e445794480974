"""The gradient mode "fused-weights": known weights, weights from a function, any loss, errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compact_ops import TokenStats, linear_token_stats, reference
from compact_ops.fused_weights import CHUNK, chunk_bounds, chunk_size
from compact_ops.testing import (
    OPCHECKS,
    Inputs,
    cast,
    compare,
    head_inputs,
    head_terms,
    opcheck,
    run,
)

LEAVES = ("hidden", "weight", "bias")


def upstream(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The upstream gradient of `run`: weights that are not uniform, some of them 0."""
    weight = torch.linspace(-1, 2, count, dtype=dtype)
    weight[1::7] = 0
    return weight


def check(
    inputs: Inputs,
    dtype: torch.dtype = torch.float32,
    leaves: tuple[str, ...] = LEAVES,
    **options: Any,
) -> None:
    """Checks fused statistics and gradients with the tolerance rule."""
    given = cast(inputs, dtype)
    got = run(linear_token_stats, given | {"head_grad": "fused-weights"} | options, leaves)
    theirs = run(reference.linear_token_stats, given, leaves)
    for name, truth in run(
        reference.linear_token_stats, cast(given, torch.float64), leaves
    ).items():
        compare(name, got[name], theirs[name], truth, ulps=64)


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("tokens", [0, 1, 37, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients(
    dtype: torch.dtype, tokens: int, rows: int | None, by_function: bool, caplog: Any
) -> None:
    """Bias, softcap, scale and gold, no token to several chunks, and no product twice."""
    inputs = head_inputs(1, tokens=tokens, rows=rows) | head_terms()
    weight = upstream(tokens, torch.promote_types(dtype, torch.float32))
    known = (lambda some, _: weight[some]) if by_function else weight
    check(inputs, dtype, token_weight=known)
    assert "computes the gradients again" not in caplog.text


@pytest.mark.parametrize("leaves", [("weight",), ("bias",), ("hidden", "weight"), ("hidden",)])
def test_what_is_trained(leaves: tuple[str, ...]) -> None:
    """Any of the three may be frozen."""
    inputs = head_inputs(2) | head_terms()
    check(inputs, leaves=leaves, token_weight=upstream(37))
    check(inputs, leaves=leaves, token_weight=lambda some, _: upstream(37)[some])


@settings(max_examples=30)
@given(
    st.integers(0, 60), st.integers(1, 30), st.integers(1, 600), st.integers(0, 99), st.booleans()
)
def test_any_shape(tokens: int, width: int, vocabulary: int, seed: int, terms: bool) -> None:
    """Drawn shapes, with all head terms and without."""
    inputs = head_inputs(seed, tokens, width, vocabulary)
    inputs |= head_terms(vocabulary) if terms else {}
    leaves = LEAVES if terms else LEAVES[:2]
    check(inputs, leaves=leaves, token_weight=upstream(tokens))


@pytest.mark.parametrize("scale", [0.3, 1.0, -7.0])
def test_a_multiple_of_the_weights_costs_nothing(
    scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    """For the usual loss, with any divisor, the gradients of the forward are used."""
    found = []
    for mode in ("fused-weights", "recompute"):
        inputs = cast(head_inputs(3) | head_terms(), torch.float32)
        leaves = [inputs[name].requires_grad_() for name in LEAVES]
        known = upstream(37) if mode == "fused-weights" else None
        stats = linear_token_stats(**inputs, head_grad=mode, token_weight=known)
        loss = scale * (upstream(37) * stats.nll).mean() / 3
        found.append(torch.autograd.grad(loss, leaves))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert "again" not in caplog.text


@pytest.mark.parametrize("by_function", [False, True])
def test_gradients_have_no_graph(by_function: bool) -> None:
    """A caller may add them up or read them with numpy, as those of any other operator."""
    inputs = cast(head_inputs(3), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    seen = []
    leaves[1].register_hook(lambda grad: seen.append(grad.requires_grad))
    known = (lambda some, _: upstream(37)[some]) if by_function else upstream(37)
    stats = linear_token_stats(**inputs, token_weight=known)
    found = torch.autograd.grad((stats.weight * stats.nll).sum(), leaves)
    assert seen == [False] and not any(grad.requires_grad for grad in found)


def test_a_tiny_weight_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The product of a subnormal weight and a divisor is not exact: the others decide."""
    inputs = cast(head_inputs(3), torch.float32)
    inputs["weight"].requires_grad_()
    weight = upstream(37)
    weight[2] = 3e-42
    stats = linear_token_stats(**inputs, token_weight=weight)
    ((stats.weight * stats.nll).sum() / 3).backward()
    assert "again" not in caplog.text


def test_an_upstream_of_0_gives_no_gradient() -> None:
    """Also if the weighted logits overflow."""
    inputs = cast(head_inputs(3), torch.float32)
    inputs["hidden"][1] = 1e38
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    stats = linear_token_stats(**inputs, token_weight=upstream(37) + 2)
    for grad in torch.autograd.grad(stats.nll, leaves, torch.zeros(37)):
        assert int(grad.count_nonzero()) == 0


@pytest.mark.parametrize("by_function", [False, True])
def test_another_loss_is_exact_and_warns(
    by_function: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """If the upstream gradient is not a multiple of the weights, dW is computed again."""
    weight = torch.rand(37, generator=torch.Generator().manual_seed(0))
    known = (lambda some, _: weight[some]) if by_function else weight
    inputs = head_inputs(4, rows=9) | head_terms()
    with caplog.at_level(logging.WARNING, "compact_ops"):
        check(inputs, token_weight=known)
    assert "computes the gradients again" in caplog.text


def test_the_upstream_of_ignored_tokens_does_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    """The weight of an ignored token does not cause a recomputation."""
    inputs = cast(head_inputs(5), torch.float32)
    inputs["weight"].requires_grad_()
    weight = upstream(37)
    stats = linear_token_stats(**inputs, token_weight=weight)
    changed = torch.where(inputs["target"] == -100, 5.0, weight)
    stats.nll.backward(changed)
    assert "again" not in caplog.text and inputs["weight"].grad is not None


def test_all_ignored() -> None:
    """Loss and gradients are 0."""
    inputs = cast(head_inputs(6), torch.float32) | {"target": torch.full((37,), -100)}
    options = {"token_weight": upstream(37)}
    found = run(linear_token_stats, inputs | options, ("hidden", "weight"))
    assert all(float(found[n].abs().max()) == 0 for n in ("nll", "d_hidden", "d_weight"))


def test_weights_of_whole_problems_from_their_statistics() -> None:
    """A function that sets a problem's rationales against each other gets whole problems, in order,
    and the gradients are those of the weights that it returned."""
    sizes = [40, 0, 100, 160, 300, 7]  # of problems; the fifth is larger than a chunk
    offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
    inputs = cast(head_inputs(7, tokens=offsets[-1], vocabulary=500), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    seen: list[slice] = []

    def weigh(tokens: slice, stats: TokenStats) -> Tensor:
        seen.append(tokens)
        assert stats.nll.shape == stats.gold_logp.shape == (tokens.stop - tokens.start,)
        assert not stats.nll.requires_grad and stats.weight is None
        parts = []
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
            if tokens.start <= begin < tokens.stop and end > begin:
                some = slice(begin - tokens.start, end - tokens.start)
                parts.append(torch.softmax(stats.gold_logp[some] - stats.nll[some], 0))
        return torch.cat(parts)

    stats = linear_token_stats(**inputs, token_weight=weigh, problem_offsets=offsets)
    assert [s.start for s in seen] == [0, 140, 300, 600] and seen[-1].stop == offsets[-1]
    found = torch.autograd.grad((stats.weight * stats.nll).sum(), leaves)
    plain = linear_token_stats(**inputs, head_grad="recompute")
    want_weight = torch.cat(
        [
            torch.softmax((plain.gold_logp - plain.nll.detach())[i:j], 0)
            for i, j in zip(offsets[:-1], offsets[1:], strict=True)
        ]
    )
    torch.testing.assert_close(stats.weight, want_weight)
    want = torch.autograd.grad((want_weight * plain.nll).sum(), leaves)
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train_head", [False, True])
def test_a_function_is_asked_in_every_mode(train_head: bool) -> None:
    """The weights are computed also if the head is not trained or no gradient is needed."""
    inputs = cast(head_inputs(8), torch.float32)
    inputs["hidden"].requires_grad_()
    inputs["weight"].requires_grad_(train_head)
    with_grad = linear_token_stats(**inputs, token_weight=lambda _, s: s.nll + 1)
    with torch.no_grad():
        without = linear_token_stats(**inputs, token_weight=lambda _, s: s.nll + 1)
    torch.testing.assert_close(with_grad.weight, with_grad.nll.detach() + 1)
    torch.testing.assert_close(without.weight, with_grad.weight)


def test_gradcheck() -> None:
    """The loss with fixed weights against finite differences, in float64."""
    inputs = head_inputs(9, tokens=6, width=4, vocabulary=23, rows=3) | head_terms(23)
    weight = upstream(6, torch.float64)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        changed = inputs | {"hidden": hidden, "weight": head, "bias": bias}
        stats = linear_token_stats(**changed, token_weight=weight)
        return (stats.weight * stats.nll).sum()

    leaves = tuple(inputs[name].requires_grad_() for name in LEAVES)
    assert torch.autograd.gradcheck(loss, leaves)


def test_chunk_operators_are_registered() -> None:
    """Schema (what is overwritten), fake tensors and tracing of the two halves of a chunk."""
    inputs = cast(head_inputs(10), torch.float32)
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]
    blocks = torch.zeros(40, 301)
    numbers = 0.0, 1.0, -100
    first = torch.ops.compact.linear_token_stats_fused
    args = blocks, hidden, weight, target, *inputs["gold"], None, None, *numbers, 0.0
    args += True, True, True, True  # need_hidden and the optional statistics
    # The statistics of a second run differ in what lies in `blocks` only.
    torch.library.opcheck(first.default, args)
    nll, lse, *_, shift = first(*args)
    sums = torch.zeros(301, 19), torch.zeros(0)
    second = torch.ops.compact.linear_token_stats_fused_backward
    torch.library.opcheck(
        second.default, (*sums, blocks, upstream(37), hidden, target, nll, lse, shift, *numbers)
    )


def test_compiled_with_a_loss_of_its_own() -> None:
    """With torch.compile too, the gradients are exact for any loss, multiple or not."""
    inputs = cast(head_inputs(11), torch.float32) | {"token_weight": upstream(37)}
    compiled = torch.compile(linear_token_stats, fullgraph=True, backend="aot_eager")
    for factor in (upstream(37), torch.rand(37)):
        found = []
        for function in (compiled, linear_token_stats):
            leaves = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight")]
            inputs |= dict(zip(("hidden", "weight"), leaves, strict=True))
            found.append(torch.autograd.grad((factor * function(**inputs).nll).sum(), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("by_function", [False, True])
def test_backward_again(by_function: bool) -> None:
    """With retain_graph, a later backward gives the same gradients, whatever happened to them."""
    inputs = cast(head_inputs(12), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
    known = (lambda some, _: upstream(37)[some]) if by_function else upstream(37)
    stats = linear_token_stats(**inputs, token_weight=known)
    loss = (stats.weight * stats.nll).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    for more in (True, False):
        for leaf in leaves:
            leaf.grad.mul_(0.5)  # clipped
        loss.backward(retain_graph=more)
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 1.75 * grad)


def test_the_last_backward_does_not_copy() -> None:
    """The gradient of the head is the tensor that the forward made."""
    inputs = cast(head_inputs(12), torch.float32)
    inputs["weight"].requires_grad_()
    stats = linear_token_stats(**inputs, token_weight=upstream(37))
    kept = stats.nll.grad_fn.saved_tensors[1].data_ptr()
    (stats.weight * stats.nll).sum().backward()
    assert inputs["weight"].grad.data_ptr() == kept


def test_registration_of_the_compiled_path() -> None:
    """The operator around the chunks and the one of its backward.

    Without the test that differentiates all outputs, which the operator refuses for all but nll;
    the tests with torch.compile above trace it.
    """
    inputs = cast(head_inputs(13) | head_terms(), torch.float32)
    inputs |= {"token_weight": upstream(37)}
    checked = opcheck(linear_token_stats, inputs, tests=OPCHECKS[:-1], leaves=LEAVES)
    assert "compact_fused::linear_token_stats" in checked


@given(st.lists(st.integers(0, 400), max_size=8))
def test_chunks_hold_whole_problems(sizes: list[int]) -> None:
    """Bounds are offsets of problems; only a chunk of one problem may exceed the limit."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
    bounds = chunk_bounds(offsets[-1], offsets)
    assert bounds[0] == 0 and bounds[-1] == offsets[-1] and set(bounds) <= set(offsets)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        inside = [b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)
                  if begin <= a and b <= end and b > a]  # fmt: skip
        assert end - begin <= CHUNK or len(inside) == 1


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"token_weight": torch.zeros(36)}, ValueError, "token_weight must have shape"),
        ({"token_weight": torch.zeros(37).long()}, TypeError, "token_weight must have dtype"),
        ({"token_weight": 0.5}, TypeError, "token_weight must be a Tensor or a function"),
        ({"token_weight": None}, ValueError, "head_grad 'fused-weights' needs token_weight"),
        ({"head_grad": "stash"}, ValueError, "token_weight must be None with head_grad 'stash'"),
        ({"problem_offsets": [0, 37]}, ValueError, "problem_offsets must be None"),
        (
            {"token_weight": lambda _, s: s.nll, "problem_offsets": [0, 20]},
            ValueError,
            "problem_offsets must rise from 0 to M = 37",
        ),
        (
            {"token_weight": lambda _, s: s.nll, "problem_offsets": [0, 20, 10, 37]},
            ValueError,
            "problem_offsets must rise",
        ),
        ({"token_weight": lambda _, s: s.nll[1:]}, ValueError, "token_weight.{5} must have shape"),
        ({"token_weight": lambda _, s: 1.0}, TypeError, "token_weight.{5} must be a Tensor"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    inputs = cast(head_inputs(), torch.float32)
    inputs["weight"].requires_grad_()
    options = {"head_grad": "fused-weights", "token_weight": upstream(37)} | change
    with pytest.raises(error, match=f"^linear_token_stats: {message}.*got"):
        linear_token_stats(**inputs, **options)


@pytest.mark.parametrize(
    ("vocabulary", "on_gpu", "size"),
    [(49_152, False, CHUNK), (32_000, True, 4_096), (151_936, True, 883), (1 << 20, True, CHUNK)],
)
def test_chunks_of_a_gpu_fill_half_a_gibibyte(vocabulary: int, on_gpu: bool, size: int) -> None:
    assert chunk_size(vocabulary, on_gpu=on_gpu) == size
