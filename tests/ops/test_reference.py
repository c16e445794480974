"""Tests for what the plain-torch reference shares with the kernels besides their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import compact_ops
from compact_ops import GoldAnswers, linear_token_stats, reference, row_stats_
from compact_ops.testing import SAMPLES, cast, head_inputs

HEAD = {"hidden": torch.ones(6, 8), "weight": torch.ones(40, 8), "target": torch.arange(6)}
LOGITS = {"logits": torch.ones(6, 40), "target": torch.arange(6)}
SCORES = {"scores": torch.ones(1, 5), "beta": torch.ones(1), "prior_std": torch.ones(1)}
PAIRS = {"hidden": HEAD["hidden"], "weight": HEAD["weight"], "left": torch.zeros(2).long()}
UNIT = {"unit": torch.ones(6, 8), "rows": torch.zeros(6).long(), "weight": torch.ones(2)}
QUERY = {name: torch.ones(1, 4, 2, 8) for name in ("query", "key", "value")}


def ints(*values: int) -> Tensor:
    """A vector of token ids, rows or offsets."""
    return torch.tensor(values)


def gold(ids: Tensor, offsets: Tensor, problem: int = 0) -> dict[str, GoldAnswers]:
    """Gold answers, with the same problem for all six tokens."""
    return {"gold": GoldAnswers(ids, offsets, torch.full((6,), problem))}


@pytest.mark.parametrize(
    "op,inputs,message",
    [
        ("linear_token_stats", HEAD | {"target": ints(0, 1, 2, 3, 4, 40)}, r"target\[5\].*got 40"),
        ("linear_token_stats", HEAD | {"target": ints(0, -1, 2, 3, 4, 5)}, r"target\[1\].*got -1"),
        ("linear_token_stats", HEAD | {"rows": ints(0, 1, 2, 3, 4, 6)}, r"rows\[5\] .*\[0, 6\)"),
        ("linear_token_stats", HEAD | {"rows": ints(0, 1, 2, 3, 4, -1)}, r"rows\[5\].*got -1"),
        (
            "linear_token_stats",
            HEAD | {"score_ids": torch.tensor([[0, -1]] * 5 + [[0, -2]])},
            r"score_ids\[5, 1\] must be in \[-1, 40\), got -2",
        ),
        ("linear_token_stats", HEAD | gold(ints(-1, 2), ints(0, 2)), r"gold\.ids\[0\].*got -1"),
        ("linear_token_stats", HEAD | gold(ints(1, 2), ints(0, 3)), r"gold\.offsets\[1\].*got 3"),
        ("linear_token_stats", HEAD | gold(ints(1, 2), ints(2, 0)), r"at least .* = 2, got 0"),
        ("linear_token_stats", HEAD | gold(ints(1, 2), ints(0, 2), -1), r"gold\.problem\[0\]"),
        ("linear_token_stats", HEAD | gold(ints(1, 2), ints(0, 0, 2)), "with an answer, got 0"),
        ("row_stats_", LOGITS | {"target": ints(0, 1, 2, 3, 4, 40)}, r"target\[5\].*got 40"),
        ("row_stats_", LOGITS | gold(ints(1, 40), ints(0, 2)), r"gold\.ids\[1\].*got 40"),
        ("accumulate_weighted", UNIT | {"num_rows": 0, "group": ints(*[0] * 6)}, r"rows\[0\]"),
        ("accumulate_weighted", UNIT | {"num_rows": 1, "group": ints(0, 0, -1, 0, 0, 0)}, "group"),
        ("pairwise_symmetric_kl", PAIRS | {"right": ints(0, -1)}, r"right\[1\].*got -1"),
        ("problem_weights", SCORES | {"offsets": ints(0, 3)}, "run from 0 to R = 5, got"),
        ("problem_weights", SCORES | {"offsets": ints(0, 3, 2, 5)}, r"\[2\].*larger.*= 3, got 2"),
        ("problem_weights", SCORES | {"offsets": ints(-2, 5)}, r"offsets\[0\].*got -2"),
        ("tree_attention", QUERY | {"parts": ints(0, 0, 9, 0, 0)[None]}, r"parts\[0, 1:3\]"),
        ("tree_attention", QUERY | {"parts": ints(-1, 0, 4, 0, 0)[None]}, r"parts\[0, 0\]"),
        (
            "tree_attention",
            QUERY | {"parts": torch.tensor([[0, 0, 3, 0, 0], [0, 2, 4, 0, 0]])},
            "overlap another part, got token 2 twice",
        ),
    ],
)
def test_both_refuse_an_index_out_of_range(op: str, inputs: dict[str, Any], message: str) -> None:
    """Plain torch would read the last entry for -1, and raise texts of its own for the others."""
    if op == "accumulate_weighted":
        inputs = inputs | ({} if "group" in inputs else {"group": None})
    for function in (getattr(compact_ops, op), getattr(reference, op)):
        with pytest.raises(RuntimeError, match=f"^{op}: .*{message}"):
            function(**inputs)


@pytest.mark.parametrize("op", SAMPLES)
def test_autocast_changes_nothing(op: str) -> None:
    """Both compute in float32, inside autocast too."""
    for function in (getattr(compact_ops, op), getattr(reference, op)):
        found = []
        for enabled in (False, True):
            inputs = cast(SAMPLES[op].make(0, 9), torch.float32)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = function(**inputs)
            found.append([x for x in (out if isinstance(out, tuple) else (out,)) if x is not None])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("function", [row_stats_, reference.row_stats_])
def test_rows_in_inference_mode(function: Callable[..., Any]) -> None:
    """The same logits and statistics as outside of it."""
    wanted = LOGITS | {"logits": torch.randn(6, 40), "bias": torch.randn(40)}
    wanted |= {"weight": torch.linspace(0, 1, 6)}
    with torch.inference_mode():
        given = {name: value.clone() for name, value in wanted.items()}
        stats = function(**given)
    want = reference.row_stats_(**wanted)
    torch.testing.assert_close(given["logits"], wanted["logits"])
    torch.testing.assert_close(stats.nll, want.nll)


@pytest.mark.parametrize("op", sorted(set(SAMPLES) - {"row_stats_", "problem_weights"}))
def test_forward_mode_is_refused(op: str) -> None:
    """Torch would return a derivative of 0 for the kernels, without a word."""
    inputs = cast(SAMPLES[op].make(0, 9), torch.float32)
    leaf = SAMPLES[op].leaves[0]

    def first(value: Tensor) -> Tensor:
        out = getattr(compact_ops, op)(**inputs | {leaf: value})
        return out if isinstance(out, Tensor) else out[0]

    with pytest.raises(NotImplementedError, match=f"^{op}: {leaf} .*forward-mode"):
        torch.func.jvp(first, (inputs[leaf],), (torch.ones_like(inputs[leaf]),))


def test_a_tensor_of_several_processes_is_refused() -> None:
    """The kernels would read the part that this process holds."""

    class DTensor(torch.Tensor):
        full_tensor = True

    weight = HEAD["weight"].as_subclass(DTensor)
    with pytest.raises(TypeError, match=r"weight must be whole, got a DTensor; .*full_tensor\(\)"):
        linear_token_stats(**HEAD | {"weight": weight})


def test_float64_is_exact_by_default() -> None:
    """A stash in bfloat16 would round the gradient of the head: auto does not pick it."""
    inputs = cast(head_inputs(0), torch.float64)
    grads = []
    for function in (linear_token_stats, reference.linear_token_stats):
        leaf = inputs["weight"].clone().requires_grad_()
        nll = function(**inputs | {"weight": leaf}).nll
        grads.append(torch.autograd.grad(nll.sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
