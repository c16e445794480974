"""Tests for every public operator: tolerance rule, gradients, registration, strides, exact bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import compact_ops
from compact_ops import backend, testing
from compact_ops.testing import SAMPLES, Inputs, cast, head_inputs, run, score_ids
from compact_ops.types import GoldAnswers

# The operators, and the head's gradient modes and filter, which have their own kernels.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {op: (op, {}) for op in SAMPLES} | {
    f"linear_token_stats-{name}": ("linear_token_stats", options)
    for name, options in {
        "stash": {"head_grad": "stash"},
        "recompute": {"head_grad": "recompute"},
        "fused": {"head_grad": "fused-weights", "token_weight": None},
        "filter": {"head_grad": "recompute", "filter_eps": 2.0**-12},
        "statistics": {"head_grad": "stash", "score_ids": None},
        "fused-statistics": {"head_grad": "fused-weights", "token_weight": None, "score_ids": None},
    }.items()
}


def sample(way: str, dtype: torch.dtype, seed: int = 0, size: int = 37) -> Inputs:
    """Arguments of one entry of WAYS, including its options."""
    op, options = WAYS[way]
    found = cast(SAMPLES[op].make(seed, size), dtype) | options
    if "token_weight" in options:
        found["token_weight"] = torch.linspace(-1, 2, size, dtype=dtype)
    if "score_ids" in options:
        found |= {"statistics": compact_ops.STATISTICS, "score_ids": score_ids(size)}
    return found


def results(way: str, inputs: Inputs) -> dict[str, Tensor]:
    """All results of one entry of WAYS, including gradients and overwritten arguments."""
    op = WAYS[way][0]
    return run(getattr(compact_ops, op), inputs, SAMPLES[op].leaves, SAMPLES[op].changed)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two results are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_runs_natively() -> None:
    """These tests need the native kernels; they must not compare the reference with itself."""
    assert backend() == "native"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", SAMPLES)
def test_tolerance_rule(op: str, dtype: torch.dtype) -> None:
    """The error against float64 is at most twice torch's own plus a few units."""
    exact = {"head_grad": "recompute"} if op == "linear_token_stats" else {}
    testing.check(op, SAMPLES[op].make(0, 37), dtype, **exact)


@pytest.mark.parametrize("way", WAYS)
def test_registration(way: str) -> None:
    """Schema, fake tensors, autograd and symbolic tracing of each native operator that it uses."""
    op = WAYS[way][0]
    checked = testing.opcheck(
        getattr(compact_ops, op),
        sample(way, torch.float32),
        leaves=SAMPLES[op].leaves,
        changed=SAMPLES[op].changed,
    )
    assert any(name.endswith(f"::{op}") for name in checked)


@pytest.mark.parametrize("way", ["accumulate_weighted", "filtered_matmul", "pairwise_symmetric_kl",
                                 "linear_token_stats-recompute", "tree_attention"])  # fmt: skip
def test_gradcheck(way: str) -> None:
    """The analytical gradient against finite differences, in float64."""
    op = WAYS[way][0]
    inputs = sample(way, torch.float64, seed=1, size=9)
    if way == "filtered_matmul":
        inputs["eps"] = 0.0  # finite differences do not show the mean of the rounding
    leaves = SAMPLES[op].leaves

    def first(*values: Tensor) -> Tensor:
        value = getattr(compact_ops, op)(**inputs | dict(zip(leaves, values, strict=True)))
        return value if isinstance(value, Tensor) else value[0]

    wanted = tuple(inputs[name].requires_grad_() for name in leaves)
    assert torch.autograd.gradcheck(first, wanted, fast_mode=True)


def _strided(value: Tensor) -> Tensor:
    """The same numbers, every second one of a larger tensor."""
    return torch.stack([value, value + 1], dim=-1)[..., 0]


def _each(inputs: Inputs, keep: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Inputs:
    """Changes every tensor, including those of gold, except the arguments in `keep`."""

    def changed(value: Any) -> Any:
        if isinstance(value, GoldAnswers):
            return GoldAnswers(*map(change, value))
        return change(value) if isinstance(value, Tensor) else value

    return {k: v if k in keep else changed(v) for k, v in inputs.items()}


def _transposed(value: Tensor) -> Tensor:
    """The same numbers, column by column."""
    return value.mT.contiguous().mT if value.dim() > 1 else value


@pytest.mark.parametrize("way", WAYS)
def test_layout_and_index_type_change_nothing(way: str) -> None:
    """Strided tensors and int32 indices give the same bits as contiguous ones and int64."""
    inputs = sample(way, torch.float32)
    changed = SAMPLES[WAYS[way][0]].changed
    want = results(way, inputs)
    assert same(results(way, _each(inputs, changed, _strided)), want)
    narrow = _each(inputs, changed, lambda x: x.int() if x.dtype == torch.int64 else x)
    assert same(results(way, narrow), want)


@pytest.mark.parametrize("way", WAYS)
def test_fakes_know_the_strides(way: str) -> None:
    """Of the results for transposed inputs: torch.compile relies on them."""
    op = WAYS[way][0]
    changed = SAMPLES[op].changed
    inputs = _each(sample(way, torch.float32), changed, _transposed)
    options = {"leaves": SAMPLES[op].leaves, "changed": changed}
    testing.opcheck(getattr(compact_ops, op), inputs, ("test_faketensor",), **options)


@pytest.mark.parametrize("way", [w for w in WAYS if SAMPLES[WAYS[w][0]].leaves])
def test_expanded_upstream(way: str) -> None:
    """The gradient of a sum arrives with stride 0."""
    op = WAYS[way][0]
    inputs = sample(way, torch.float32)
    grads = []
    for expanded in (True, False):
        for name in SAMPLES[op].leaves:
            inputs[name] = inputs[name].detach().requires_grad_()
        out = getattr(compact_ops, op)(**inputs)
        out = out if isinstance(out, Tensor) else out[0]
        one = torch.ones((), dtype=out.dtype)
        upstream = one.expand(out.shape) if expanded else torch.ones_like(out)
        leaves = [inputs[name] for name in SAMPLES[op].leaves]
        grads.append(torch.autograd.grad(out, leaves, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_autocast_changes_nothing(way: str) -> None:
    """Under autocast float32 inputs are computed in float32, forward and backward, to the bit."""
    inputs = sample(way, torch.float32)
    want = results(way, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(way, inputs)
    assert same(got, want)


def test_autocast_model_feeds_the_head() -> None:
    """With bfloat16 states of an autocast layer and a float32 head, gradients reach the layer."""
    inputs = cast(head_inputs(3), torch.float32)
    layer = torch.nn.Linear(19, 19)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(inputs["hidden"])
        stats = compact_ops.linear_token_stats(**inputs | {"hidden": hidden})
        assert hidden.dtype == torch.bfloat16 and stats.nll.dtype == torch.float32
    stats.nll.sum().backward()
    assert layer.weight.grad is not None and float(layer.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("way", WAYS)
def test_compiles_in_one_graph(way: str) -> None:
    """torch.compile(fullgraph=True) traces it without breaks; other sizes need no recompilation."""
    torch._dynamo.reset()
    op = WAYS[way][0]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def call(inputs: Inputs) -> Any:
        return getattr(compact_ops, op)(**inputs)

    def compiled(**inputs: Any) -> Any:
        return call(inputs)

    graphs = []
    for seed, size in ((1, 37), (2, 52), (3, 61)):
        inputs = sample(way, torch.float32, seed, size)
        got = run(compiled, inputs, SAMPLES[op].leaves, SAMPLES[op].changed)
        assert same(got, results(way, inputs))
        graphs.append(counter.frame_count)
    # With Python numbers (softcap, eps) dynamo compiles twice within the first call.
    assert graphs[0] == graphs[1] == graphs[2]


def _large(way: str) -> Inputs:
    """Sizes of several tiles, slices and tasks."""
    inputs = sample(way, torch.float32, size=700)
    if WAYS[way][0] != "linear_token_stats":
        return inputs
    options = {k: v for k, v in inputs.items() if k in (*WAYS[way][1], "softcap", "logit_scale")}
    wide = head_inputs(4, tokens=700, width=64, vocabulary=3000)
    return cast(wide | {"bias": torch.linspace(-1, 1, 3000)}, torch.float32) | options


@pytest.mark.parametrize("way", WAYS)
def test_thread_count_changes_no_bit(way: str) -> None:
    """One thread and two give the same numbers, bit for bit."""
    inputs = _large(way)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(way, inputs))
    finally:
        torch.set_num_threads(before)
    assert same(*found)


_CHECK_ALL = """
import torch
from compact_ops import STATISTICS, testing
from compact_ops.testing import SAMPLES, check, head_inputs, head_terms, score_ids
torch.set_num_threads(1)
for op, sample in SAMPLES.items():
    exact = {"head_grad": "recompute"} if op == "linear_token_stats" else {}
    check(op, sample.make(0, 37), torch.float32, **exact)
    check(op, sample.make(1, 37), torch.float64, **exact)
for terms in ({}, head_terms(1000)):
    case = head_inputs(2, vocabulary=1000, width=33) | terms
    case |= {"statistics": STATISTICS, "score_ids": score_ids(37)}
    check("linear_token_stats", case, torch.float32, ("hidden",))
    upstream = torch.linspace(-1, 2, 37)
    upstream[1::7] = 0
    for eps in (0.0, 2.0**-20):
        fused = {"head_grad": "fused-weights", "token_weight": upstream, "filter_eps": eps}
        check("linear_token_stats", case, torch.float32, **fused)
        check("linear_token_stats", case, torch.float32, ("hidden",), filter_eps=eps)
print("ok")
"""


@pytest.mark.parametrize("capability", ["base", "avx2", "avx512", "sse9"])
def test_every_instruction_set(capability: str) -> None:
    """Each build of the kernels against float64; one that the CPU cannot run raises an error."""
    with open("/proc/cpuinfo") as info:
        flags = info.read()
    present = {"base": True, "avx2": "avx2" in flags, "avx512": "avx512f" in flags, "sse9": False}
    env = os.environ | {"COMPACT_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", _CHECK_ALL]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if present[capability]:
        assert done.stdout.strip() == "ok", done.stderr
    else:
        assert done.returncode != 0
        assert re.search(rf"COMPACT_CPU_CAPABILITY.*{capability}", done.stderr), done.stderr
