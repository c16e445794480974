"""The statistics that a call of the head asks for: rank, sum_p2, margin, score_logp."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compact_ops import STATISTICS, TokenStats, linear_token_stats, reference
from compact_ops.fused_weights import CHUNK
from compact_ops.testing import Inputs, cast, check, compare, head_inputs, head_terms, score_ids

ASKED = {"statistics": STATISTICS}
MODES = ("none", "frozen", "stash", "recompute", "fused-weights", "function")


def whole_numbers(inputs: Inputs) -> Inputs:
    """Small whole numbers: every product and sum is exact in every dtype, and many logits tie."""
    return inputs | {name: inputs[name].round().clamp(-3, 3) for name in ("hidden", "weight")}


def in_mode(mode: str, inputs: Inputs) -> TokenStats:
    """The statistics of a call in one gradient mode."""
    count, options = (
        len(inputs["target"]),
        {} if mode in ("none", "function") else {"head_grad": mode},
    )
    given = inputs | options
    if mode != "none":
        given["hidden"] = given["hidden"].detach().requires_grad_()
        given["weight"] = given["weight"].detach().requires_grad_(mode != "frozen")
    if mode == "fused-weights":
        given["token_weight"] = torch.linspace(-1, 2, count)
    if mode == "function":
        given["token_weight"] = lambda tokens, stats: stats.nll + 1
    return linear_token_stats(**given)


def asked_of(stats: TokenStats) -> dict[str, Tensor]:
    """The statistics that were asked for, by name."""
    return {name: getattr(stats, name) for name in (*STATISTICS, "score_logp")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_mode(dtype: torch.dtype, rows: int | None, mode: str) -> None:
    """Bias, softcap, scale, repeated rows, ignored tokens, with the tolerance rule."""
    tokens = 2 * CHUNK + 5
    inputs = head_inputs(3, tokens=tokens, rows=rows) | head_terms() | ASKED
    inputs |= {"score_ids": score_ids(tokens)}
    given = cast(inputs, dtype)
    theirs = asked_of(reference.linear_token_stats(**given))
    truth = asked_of(reference.linear_token_stats(**cast(given, torch.float64)))
    for name, got in asked_of(in_mode(mode, given)).items():
        compare(f"{mode}: {name}", got, theirs[name], truth[name], ulps=64)
        assert got.dtype == (torch.int32 if name == "rank" else theirs[name].dtype)


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 900),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    mode=st.sampled_from(MODES),
    columns=st.integers(0, 16),
    seed=st.integers(0, 10_000),
)
def test_any_shape_with_ties(
    tokens: int,
    width: int,
    vocabulary: int,
    rows: int | None,
    dtype: torch.dtype,
    mode: str,
    columns: int,
    seed: int,
) -> None:
    """With exact logits and many ties the rank is that of float64, and 1 where it is correct."""
    inputs = whole_numbers(head_inputs(seed, tokens, width, vocabulary, rows)) | ASKED
    inputs |= {"score_ids": score_ids(tokens, vocabulary, columns, seed)}
    got = in_mode(mode, cast(inputs, dtype))
    want = reference.linear_token_stats(**inputs)
    assert torch.equal(got.rank, want.rank)
    assert torch.equal(got.correct, got.rank == 1)
    live = inputs["target"] != -100
    assert torch.equal(got.margin.double(), want.margin)  # whole numbers, inf with one token
    assert torch.equal(got.correct, live & (got.margin >= 0))
    for name in ("sum_p2", "score_logp"):
        found = getattr(got, name).double()
        torch.testing.assert_close(found, getattr(want, name), rtol=2e-5, atol=2e-5)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 60),
    vocabulary=st.integers(1, 900),
    terms=st.booleans(),
    shift=st.sampled_from([0.0, 1e-7, 30.0]),
    seed=st.integers(0, 10_000),
)
def test_rank_lies_within_rounding(
    tokens: int, vocabulary: int, terms: bool, shift: float, seed: int
) -> None:
    """For any numbers: between the counts of logits above the target's by more than rounding."""
    inputs = head_inputs(seed, tokens, 16, vocabulary) | ASKED
    inputs |= head_terms(vocabulary) if terms else {}
    inputs["hidden"] = inputs["hidden"] * shift if shift else inputs["hidden"]
    given = cast(inputs, torch.float32)
    got = linear_token_stats(**given)
    wide = cast(given, torch.float64)
    z = reference._logits(
        wide["hidden"], wide["weight"], wide.get("bias"), wide.get("softcap"),
        wide.get("logit_scale", 1.0),
    )  # fmt: skip
    live = inputs["target"] != -100
    own = torch.where(live, inputs["target"], 0)[:, None]
    apart = z - z.gather(1, own)
    apart.scatter_(1, own, -torch.inf)
    slack = 1e-5 * (z.abs().amax(dim=1, keepdim=True) + shift)
    least = 1 + (apart > slack).sum(dim=1)
    most = 1 + (apart > -slack).sum(dim=1)
    assert bool(((least <= got.rank) & (got.rank <= most))[live].all())
    assert int(got.rank[~live].abs().sum()) == 0 and torch.equal(got.correct, got.rank == 1)


@pytest.mark.parametrize("mode", ["none", "frozen", "fused-weights"])
@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_more_ties_than_the_sweep_keeps(vocabulary: int, mode: str) -> None:
    """With one logit everywhere, but for a few tokens, the rows are counted a second time."""
    inputs = cast(head_inputs(1, tokens=300, vocabulary=vocabulary), torch.float32) | ASKED
    inputs["weight"] = inputs["weight"][:1].repeat(vocabulary, 1)
    inputs["bias"] = torch.zeros(vocabulary)
    inputs["bias"][5::7] = 1.0
    got = in_mode(mode, inputs).rank
    target = inputs["target"]
    larger = int((inputs["bias"] > 0).sum())
    want = torch.where(inputs["bias"][target.clamp(min=0)] > 0, 1, 1 + larger)
    assert torch.equal(got, torch.where(target == -100, 0, want).int())


def test_the_same_logits_as_correct_and_margin() -> None:
    """Two tokens with the same weights tie to the last bit, whatever the product rounds."""
    inputs = cast(head_inputs(2, tokens=400, width=333, vocabulary=1000), torch.float32) | ASKED
    inputs["weight"][500:] = inputs["weight"][:500]
    plain = linear_token_stats(**inputs)
    twin = linear_token_stats(**inputs | {"target": torch.where(
        inputs["target"] < 0, -100, (inputs["target"] + 500) % 1000)})  # fmt: skip
    live = inputs["target"] != -100
    assert torch.equal(plain.rank, twin.rank)
    assert bool((plain.rank[live] % 2 == 1).all())  # larger logits come in pairs
    assert torch.equal(plain.margin, twin.margin)


def test_excluded_tokens_and_huge_logits() -> None:
    """A bias of -inf, at some tokens and at targets; logits of thousands."""
    inputs = head_inputs(6) | {"gold": None} | ASKED
    inputs["hidden"] = inputs["hidden"] * 300
    excluded = torch.arange(301) % 3 == 1
    inputs["bias"] = torch.where(excluded, -torch.inf, 0.0).double()
    inputs["target"] = torch.arange(37)  # every third is excluded itself
    inputs["score_ids"] = score_ids(37)
    found = linear_token_stats(**cast(inputs, torch.float32))
    want = reference.linear_token_stats(**inputs)
    assert torch.equal(found.rank, want.rank)
    assert bool((want.margin[1::3] == -torch.inf).all())
    torch.testing.assert_close(found.margin.double(), want.margin, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.score_logp.double(), want.score_logp, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(found.sum_p2.double(), want.sum_p2, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("function", [linear_token_stats, reference.linear_token_stats])
def test_not_a_number(function: Any) -> None:
    """A NaN logit has no rank, and is never correct."""
    hidden, weight = torch.eye(3), torch.tensor([[1.0, 0, 0], [1.0, 2, 0], [0, 1.0, torch.nan]])
    stats = function(hidden, weight, torch.tensor([0, 1, 2]), **ASKED)
    assert stats.rank.tolist() == [0, 0, 0] and not bool(stats.correct.any())
    assert bool(stats.margin.isnan().all()) and bool(stats.sum_p2.isnan().all())


@pytest.mark.parametrize("asked", [(), ("rank",), ["margin"], {"sum_p2", "rank"}])
def test_only_what_is_asked_for(asked: Any) -> None:
    """The other fields are None, in the reference too; the plain statistics keep their bits."""
    inputs = cast(head_inputs(4), torch.float32)
    plain = linear_token_stats(**inputs)
    for function in (linear_token_stats, reference.linear_token_stats):
        stats = function(**inputs, statistics=asked)
        given = {name for name in STATISTICS if getattr(stats, name) is not None}
        assert given == set(asked) and stats.score_logp is None
    stats = linear_token_stats(**inputs, statistics=asked)
    for name in ("nll", "lse", "entropy", "correct", "gold_logit", "gold_logp"):
        assert torch.equal(getattr(stats, name), getattr(plain, name))
    assert all(getattr(plain, name) is None for name in (*STATISTICS, "score_logp"))


def test_the_weigher_sees_them() -> None:
    """In the mode "fused-weights" the function gets them for its chunk, before the weights."""
    inputs = cast(head_inputs(5, tokens=600), torch.float32) | ASKED
    inputs |= {"score_ids": score_ids(600)}
    inputs["weight"].requires_grad_()
    seen = []

    def weigh(tokens: slice, stats: TokenStats) -> Tensor:
        seen.append(asked_of(stats))
        assert stats.weight is None and stats.rank.shape == (tokens.stop - tokens.start,)
        return 1.0 / stats.rank.clamp(min=1)

    stats = linear_token_stats(**inputs, token_weight=weigh)
    for name, whole in asked_of(stats).items():
        assert torch.equal(torch.cat([part[name] for part in seen]), whole)
    assert torch.equal(stats.weight, 1.0 / stats.rank.clamp(min=1))


def test_gradients_stay_the_same() -> None:
    """Asking for statistics changes no bit of a gradient; none of them has one."""
    for mode in ("stash", "recompute", "fused-weights"):
        grads = []
        for asked in ({}, ASKED | {"score_ids": score_ids(37)}):
            inputs = cast(head_inputs(7) | head_terms(), torch.float32) | asked
            leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
            weight = torch.linspace(-1, 2, 37)
            known = {"token_weight": weight} if mode == "fused-weights" else {}
            stats = linear_token_stats(**inputs, head_grad=mode, **known)
            assert not any(x.requires_grad for x in stats[1:] if x is not None)
            grads.append(torch.autograd.grad((weight * stats.nll).sum(), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


_REFERENCE = """
import torch
from compact_ops import STATISTICS, backend, linear_token_stats
from compact_ops.testing import cast, head_inputs, score_ids
assert backend() == "reference"
inputs = cast(head_inputs(0), torch.float32) | {"score_ids": score_ids(37)}
stats = linear_token_stats(**inputs, statistics=STATISTICS)
print(stats.rank.sum().item(), stats.score_logp.shape[1], stats.margin.dtype)
"""


def test_reference_backend() -> None:
    """COMPACT_OPS_BACKEND=reference gives the same statistics."""
    env = os.environ | {"COMPACT_OPS_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE], capture_output=True, text=True, env=env
    )
    inputs = cast(head_inputs(0), torch.float32) | ASKED
    rank = int(linear_token_stats(**inputs).rank.sum())
    assert done.stdout.split() == [str(rank), "5", "torch.float32"], done.stderr


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"statistics": "rank"}, TypeError, "statistics must be a collection of names, got 'rank'"),
        ({"statistics": ("ranks",)}, ValueError, "statistics must be among rank.*got 'ranks'"),
        ({"score_ids": torch.zeros(36, 2).long()}, ValueError, "score_ids must have shape.*got"),
        ({"score_ids": torch.zeros(37, 2)}, TypeError, "score_ids must have dtype.*got float32"),
        ({"score_ids": torch.zeros(37, 17).long()}, ValueError, "score_ids must have at most 16"),
        (
            {"score_ids": torch.zeros(37, 2, device="meta").long()},
            ValueError,
            "score_ids must be on",
        ),
        (
            {"score_ids": torch.full((37, 2), 301)},
            RuntimeError,
            r"score_ids\[0, 0\] must be in \[-1, 301\), got 301",
        ),
        (
            {"score_ids": torch.full((37, 2), -2)},
            RuntimeError,
            r"score_ids\[0, 0\] must be in \[-1, 301\), got -2",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    inputs = cast(head_inputs(), torch.float32) | change
    with pytest.raises(error, match=f"linear_token_stats: {message}"):
        linear_token_stats(**inputs)


def test_every_output_of_a_call_with_gradients() -> None:
    """The tolerance rule over all outputs and gradients of one call."""
    inputs = head_inputs(8, rows=20) | head_terms() | ASKED | {"score_ids": score_ids(37)}
    check("linear_token_stats", inputs, head_grad="recompute")
