"""The head operator: values, gradient modes, shapes, extreme numbers, the filter, errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compact_ops import GoldAnswers, linear_token_stats, reference
from compact_ops.linear_token_stats import plan_head_grad
from compact_ops.testing import cast, check, head_inputs, head_terms, run

_OP = "linear_token_stats"


@pytest.mark.parametrize("leaves", [(), ("hidden",), ("weight",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients(
    dtype: torch.dtype, rows: int | None, leaves: tuple[str, ...]
) -> None:
    """Every output and gradient, with any part trained, hidden rows read once or many times."""
    check(_OP, head_inputs(rows=rows) | head_terms(), dtype, leaves, head_grad="recompute")


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_odd_shapes(vocabulary: int, width: int) -> None:
    """Vocabularies close to the block size, and widths smaller than a vector register."""
    check(_OP, head_inputs(vocabulary=vocabulary, width=width), leaves=("hidden",))


def test_several_tiles() -> None:
    """More rows than a tile has, and more blocks than slices."""
    check(_OP, head_inputs(1, tokens=600, width=24, vocabulary=9000), leaves=("hidden",))


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 600),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    terms=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_any_shape(
    tokens: int, width: int, vocabulary: int, rows: int | None, terms: bool, seed: int
) -> None:
    """Random shapes, including no token and one token, with and without all head terms."""
    inputs = head_inputs(seed, tokens, width, vocabulary, rows)
    check(_OP, inputs | (head_terms(vocabulary) if terms else {}), leaves=("hidden",), ulps=64)


@pytest.mark.parametrize("mode", ["frozen", "recompute", "stash", "fused-weights", "function"])
@pytest.mark.parametrize("rows", [None, 40])
def test_a_token_without_gradient_adds_nothing(mode: str, rows: int | None) -> None:
    """Weight 0 with logits that are not finite, and an ignored token with a weight of NaN."""
    inputs = cast(head_inputs(3, rows=rows) | {"gold": None}, torch.float32)
    if rows is not None:
        inputs["rows"] = torch.arange(37).flip(0)
    read = torch.arange(37) if rows is None else inputs["rows"]
    upstream = torch.linspace(-1, 2, 37)
    upstream[1::7] = 0
    without = (inputs["target"] == -100) | (upstream == 0)
    leaves = ("hidden",) if mode == "frozen" else ("hidden", "weight")

    def gradients(weight: Tensor, **change: Any) -> tuple[Tensor, ...]:
        changed = inputs | change
        wanted = [changed[name].requires_grad_() for name in leaves]
        if mode == "fused-weights":
            changed["token_weight"] = weight
        elif mode == "function":
            changed["token_weight"] = lambda some, _: weight[some]
        options = {} if mode == "function" else {"head_grad": mode}
        nll = linear_token_stats(**changed, **options).nll
        return torch.autograd.grad(nll, wanted, weight)

    want = gradients(upstream)
    hidden = inputs["hidden"].detach().clone()
    hidden[read[without]] = 3e38
    wrong = torch.where(inputs["target"] == -100, torch.nan, upstream)
    found = gradients(wrong, hidden=hidden)
    assert not bool(linear_token_stats(**inputs | {"hidden": hidden}).lse[without].isfinite().any())
    assert not bool(found[0][read[without]].any())
    for got, true in zip(found, want, strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ("hidden", "weight")])
def test_modes_agree(leaves: tuple[str, ...]) -> None:
    """All gradient modes agree; the stash has the precision of bfloat16."""
    inputs = cast(head_inputs(2, tokens=64, vocabulary=777), torch.float32)
    modes = ["recompute", "stash"] if "weight" in leaves else ["frozen", "recompute"]
    first = run(linear_token_stats, inputs | {"head_grad": modes[0]}, leaves)
    for mode in modes[1:]:
        found = run(linear_token_stats, inputs | {"head_grad": mode}, leaves)
        assert torch.equal(found["nll"], first["nll"])
        for name in (f"d_{leaf}" for leaf in leaves):
            loose = 2.0**-8 if mode == "stash" and name == "d_weight" else 1e-5
            error = float((found[name] - first[name]).abs().max())
            assert error <= loose * float(first[name].abs().max()), (mode, name)


def test_extreme_logits() -> None:
    """Huge logits do not overflow, and tokens that the bias excludes have probability 0."""
    inputs = head_inputs(6) | {"gold": None}
    inputs["hidden"] = inputs["hidden"] * 300
    excluded = torch.arange(301) % 3 == 1
    inputs["bias"] = torch.where(excluded, -torch.inf, 0.0).double()
    inputs["target"] = 3 * torch.arange(37)
    found = check(_OP, inputs, leaves=("hidden",))
    assert bool(torch.isfinite(found["d_hidden"]).all())


def test_all_ignored() -> None:
    """A batch without a label has loss 0 and gradient 0."""
    inputs = cast(head_inputs(8), torch.float32)
    inputs["target"] = torch.full((37,), -100)
    for mode in ("frozen", "recompute"):
        found = run(linear_token_stats, inputs | {"head_grad": mode}, ("hidden",))
        assert float(found["nll"].abs().sum()) == 0 and not bool(found["correct"].any())
        assert float(found["d_hidden"].abs().sum()) == 0


def test_another_ignore_index() -> None:
    """ignore_index may be any value, also a token id of the vocabulary."""
    inputs = cast(head_inputs(9), torch.float32)
    inputs["target"] = inputs["target"].clamp(min=0)
    inputs["target"][::4] = 7
    found = check(_OP, inputs | {"ignore_index": 7}, leaves=("hidden",))
    assert float(found["nll"][::4].abs().max()) == 0


@pytest.mark.parametrize("eps", [2.0**-12, 2.0**-7])
@pytest.mark.parametrize("mode", ["frozen", "recompute"])
def test_filter_error_bound(mode: str, eps: float) -> None:
    """Each token's gradient is within eps sum |W_v| over the p_v < eps, and far closer in mean."""
    inputs = head_inputs(4, vocabulary=2000) | {"gold": None, "logit_scale": 0.7}
    inputs["hidden"] = inputs["hidden"] * 3
    inputs = cast(inputs, torch.float32) | {"head_grad": mode}
    exact = run(linear_token_stats, inputs, ("hidden",))
    found = run(linear_token_stats, inputs | {"filter_eps": eps}, ("hidden",))
    assert torch.allclose(found["nll"], exact["nll"], atol=1e-5)
    error = (found["d_hidden"] - exact["d_hidden"]).abs()
    p = (0.7 * inputs["hidden"] @ inputs["weight"].T).softmax(-1)
    # The upstream gradient of `run` is at most 2.
    bound = 2 * 0.7 * eps * (p < eps).float() @ inputs["weight"].abs()
    assert float(error.max()) > 0
    assert bool((error <= bound + 1e-5).all())
    spread = 2 * 0.7 * (eps * torch.where(p < eps, p, 0) @ inputs["weight"].square()).sqrt()
    assert float(error.square().mean()) < 1.5 * float(spread.square().mean()) + 1e-10


def test_correct_is_of_the_largest_logit() -> None:
    """If the target ties with another token, it counts as correct; a NaN never does."""
    hidden, weight = torch.eye(3), torch.tensor([[1.0, 0, 0], [1.0, 2, 0], [0, 1.0, 0]])
    stats = linear_token_stats(hidden, weight, torch.tensor([0, 1, 2]))
    assert stats.correct.tolist() == [True, True, True]
    weight[1, 2] = torch.nan  # reaches every row: 0 x NaN is NaN
    stats = linear_token_stats(hidden, weight, torch.tensor([0, 1, 2]))
    assert stats.correct.tolist() == [False, False, False] and bool(stats.nll.isnan().all())


def test_auto_picks_by_budget_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Picks "stash" within the budget, "recompute" above it, "frozen" for a frozen head."""
    sizes = {"tokens": 1024, "width": 576, "vocabulary": 49152, "train_hidden": True}
    assert plan_head_grad("auto", **sizes, train_head=False).mode == "frozen"
    assert plan_head_grad("auto", **sizes, train_head=True).mode == "stash"
    assert plan_head_grad("auto", **sizes, train_head=True, budget_bytes=1).mode == "recompute"
    alone = plan_head_grad("auto", **sizes | {"train_hidden": False}, train_head=True)
    assert alone == ("stash", 2, 2 * 1024 * 49152)
    fused = plan_head_grad("auto", **sizes, train_head=True, weighed=True)
    assert (fused.mode, fused.products) == ("fused-weights", 3)
    inputs = cast(head_inputs(), torch.float32)
    inputs["weight"].requires_grad_()
    with caplog.at_level(logging.INFO, "compact_ops"):
        linear_token_stats(**inputs)
    assert "head_grad=auto picked stash (2 products" in caplog.text


@pytest.mark.parametrize("leaf", ["hidden", "weight"])
@pytest.mark.parametrize("mode", ["recompute", "stash", "frozen", "fused-weights"])
def test_no_second_derivative(mode: str, leaf: str) -> None:
    """A second derivative raises an error, also where the gradient is kept from the forward."""
    inputs = cast(head_inputs(), torch.float32) | {"head_grad": mode}
    if mode == "frozen" and leaf == "weight":
        return
    if mode == "fused-weights":
        inputs["token_weight"] = torch.ones(inputs["target"].shape)
    inputs[leaf].requires_grad_()
    nll = linear_token_stats(**inputs).nll
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(nll.sum(), inputs[leaf], create_graph=True)


def test_only_nll_is_differentiable() -> None:
    """The other statistics have no autograd graph: a backward through them raises."""
    inputs = cast(head_inputs(), torch.float32)
    inputs["hidden"].requires_grad_()
    stats = linear_token_stats(**inputs)
    assert stats.nll.requires_grad
    others = [x for name, x in stats._asdict().items() if name != "nll" and x is not None]
    assert len(others) == 5 and not any(x.requires_grad for x in others)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"target": torch.zeros(36, dtype=torch.int64)}, ValueError, "target must have shape"),
        ({"target": torch.zeros(37)}, TypeError, "target must"),
        ({"weight": torch.zeros(301, 18)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(0, 19)}, ValueError, "weight must have at least one row"),
        ({"hidden": torch.zeros(37)}, ValueError, "hidden must have shape"),
        ({"hidden": torch.zeros(37, 19, dtype=torch.int64)}, TypeError, "hidden must"),
        ({"bias": torch.zeros(300)}, ValueError, "bias must have shape"),
        ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
        ({"softcap": torch.inf}, ValueError, "softcap must be > 0 and finite"),
        ({"softcap": "a"}, TypeError, "softcap must be a number"),
        ({"logit_scale": torch.nan}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": torch.inf}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        ({"filter_eps": -1e-3}, ValueError, "filter_eps must"),
        ({"head_grad": "magic"}, ValueError, "head_grad must be one of"),
        ({"gold": tuple(head_inputs()["gold"])}, TypeError, "gold must be a GoldAnswers"),
        ({"statistics": iter(["rank"])}, TypeError, "statistics must be a collection"),
        ({"rows": torch.zeros(36, dtype=torch.int64)}, ValueError, "target must have shape"),
        ({"weight": torch.zeros(301, 19, device="meta")}, ValueError, "weight must be on cpu"),
        (
            {
                "gold": GoldAnswers(
                    *(torch.zeros(n, dtype=torch.int64, device="meta") for n in (1, 2, 37))
                )
            },
            ValueError,
            "gold.ids must be on cpu",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    inputs = cast(head_inputs(), torch.float32) | change
    with pytest.raises(error, match=f"^linear_token_stats: {message}.*got"):
        linear_token_stats(**inputs)


def test_a_trained_head_refuses_frozen() -> None:
    """A mode that would lose a gradient raises an error instead of returning zeros."""
    inputs = cast(head_inputs(), torch.float32)
    inputs["weight"].requires_grad_()
    with pytest.raises(ValueError, match="must not be 'frozen'"):
        linear_token_stats(**inputs, head_grad="frozen")


def test_a_problem_without_an_answer() -> None:
    """It is an error only if a token belongs to it."""
    inputs = cast(head_inputs(), torch.float32)
    ids, offsets, problem = inputs["gold"]
    want = linear_token_stats(**inputs)
    empty = torch.cat([offsets[:1], offsets[:1], offsets[1:]])  # problem 1 of 4
    moved = torch.where(problem == 0, 0, problem + 1)
    inputs["gold"] = GoldAnswers(ids, empty, torch.where(moved == 0, 1, moved))
    got = linear_token_stats(**inputs)
    assert torch.equal(got.gold_logp, want.gold_logp)
    bad = int((problem == 0).nonzero()[0])
    inputs["gold"].problem[bad] = 0
    with pytest.raises(
        RuntimeError, match=rf"gold.problem\[{bad}\] must be a problem with an answer, got 0"
    ):
        linear_token_stats(**inputs)


def test_dtype_of_the_results_is_that_of_hidden() -> None:
    """A wider head or bias does not change it, in the reference too."""
    inputs = cast(head_inputs() | head_terms(), torch.float32)
    inputs |= {name: inputs[name].double() for name in ("weight", "bias")}
    for function in (linear_token_stats, reference.linear_token_stats):
        assert function(**inputs).nll.dtype == torch.float32


def test_a_dtype_that_the_operator_does_not_take() -> None:
    """A caller of torch.ops.compact is told the expected dtypes."""
    with pytest.raises(RuntimeError, match="target must have dtype Long, got Float"):
        torch.ops.compact.row_stats_(
            torch.zeros(2, 3), torch.zeros(2), None, None, None, None, None, 0.0, 1.0, -100
        )


@pytest.mark.parametrize("name", ["target", "rows", "gold.ids", "gold.problem"])
def test_index_out_of_range(name: str) -> None:
    """An index out of range raises an error that names it; nothing is read."""
    inputs = cast(head_inputs(rows=20), torch.float32)
    table: Tensor = inputs["gold"]._asdict()[name[5:]] if "." in name else inputs[name]
    table[1] = 301
    with pytest.raises((ValueError, RuntimeError), match=rf"{name}\[1\] must be in .*got 301"):
        linear_token_stats(**inputs)
