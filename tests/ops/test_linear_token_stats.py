"""The head operator against its float64 reference: values, gradients, shapes, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compact_ops import GoldAnswers, TokenStats, backend, linear_token_stats, reference

FIELDS = ("nll", "lse", "entropy", "gold_logit", "gold_logp")


def make(
    seed: int = 0, tokens: int = 37, width: int = 19, vocabulary: int = 301, rows: int | None = None
) -> dict[str, Any]:
    """Random arguments of one call; float64, so that a case can be cast down."""
    g = torch.Generator().manual_seed(seed)
    count = tokens if rows is None else rows
    problems = 3
    counts = torch.randint(1, 4, (problems,), generator=g)
    target = torch.randint(0, vocabulary, (tokens,), generator=g)
    target[::5] = -100
    return {
        "hidden": torch.randn(count, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "target": target,
        "rows": None if rows is None else torch.randint(0, rows, (tokens,), generator=g),
        "gold": GoldAnswers(
            torch.randint(0, vocabulary, (int(counts.sum()),), generator=g),
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            torch.randint(0, problems, (tokens,), generator=g),
        ),
    }


def cast(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The case with its floating tensors in another dtype."""
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.items()
    }


def run(op: Any, case: dict[str, Any], train: str, **options: Any) -> tuple[TokenStats, Any]:
    """Runs forward, then backward of nll under a non-uniform upstream vector with zeros in it."""
    case = dict(case)
    leaves = ["hidden"] + (["weight"] if train == "head" else [])
    leaves += ["bias"] if train == "head" and case.get("bias") is not None else []
    for name in leaves:
        case[name] = case[name].clone().requires_grad_()
    stats = op(**case, **options)
    upstream = torch.linspace(-1, 2, stats.nll.numel(), dtype=stats.nll.dtype)
    upstream[1::7] = 0
    grads = torch.autograd.grad(stats.nll, [case[n] for n in leaves], upstream)
    return stats, dict(zip(leaves, grads, strict=True))


def assert_close(got: Any, want: Any, name: str, tolerance: float) -> None:
    """Compares with float64 and reports the worst index."""
    got, want = got.detach(), want.detach()
    error = (got.double() - want.double()).abs() / (1 + want.double().abs())
    if error.numel() and float(error.nan_to_num(nan=1e9).max()) > tolerance:
        worst = int(error.nan_to_num(nan=1e9).argmax())
        a, b = got.flatten()[worst], want.flatten()[worst]
        pytest.fail(f"{name}: flat index {worst}: got {a}, want {b}")


def check(case: dict[str, Any], dtype: torch.dtype, train: str, tolerance: float, **o: Any) -> None:
    """Compares one case in `dtype` with the reference in float64 on the very same numbers."""
    given_case = cast(case, dtype)
    got, got_grads = run(linear_token_stats, given_case, train, **o)
    want, want_grads = run(reference.linear_token_stats, cast(given_case, torch.float64), train)
    for name in FIELDS:
        if getattr(want, name) is not None:
            assert_close(getattr(got, name), getattr(want, name), name, tolerance)
    assert torch.equal(got.correct, want.correct)
    for name, want_grad in want_grads.items():
        assert got_grads[name].dtype == dtype
        assert_close(got_grads[name], want_grad, f"d_{name}", o.get("grad_tolerance", tolerance))


def test_runs_natively() -> None:
    """These tests are about the kernels, not about the reference compared with itself."""
    assert backend() == "native"


@pytest.mark.parametrize("train", ["hidden", "head"])
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_values_and_gradients(
    dtype: torch.dtype, tolerance: float, rows: int | None, train: str
) -> None:
    """Every output and gradient in float32 and float64, hidden rows read once or many times."""
    mode = {"head_grad": "recompute"} if train == "head" else {}
    check(make(rows=rows), dtype, train, tolerance, **mode)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_odd_shapes(vocabulary: int, width: int) -> None:
    """Vocabularies around the block size, and widths that fill no vector register."""
    check(make(vocabulary=vocabulary, width=width), torch.float32, "hidden", 2e-5)


def test_head_terms() -> None:
    """Bias, softcap and logit scale, in the value and through the chain of the gradient."""
    case = make(5) | {"softcap": 3.0, "logit_scale": 0.7}
    case["bias"] = torch.linspace(-1, 1, 301, dtype=torch.float64)
    check(case, torch.float32, "hidden", 2e-5)
    check(case, torch.float64, "head", 1e-10, head_grad="recompute")


@pytest.mark.parametrize("train", ["hidden", "head"])
def test_modes_agree(train: str) -> None:
    """Each way to the gradient gives the same; the stash is in bfloat16 and as exact as that."""
    case = cast(make(2, tokens=64, vocabulary=777), torch.float32)
    modes = ["recompute", "stash"] if train == "head" else ["frozen", "recompute"]
    first, want = run(linear_token_stats, case, train, head_grad=modes[0])
    for mode in modes[1:]:
        stats, got = run(linear_token_stats, case, train, head_grad=mode)
        assert torch.equal(stats.nll, first.nll)
        for name in want:
            loose = 2e-2 if mode == "stash" and name == "weight" else 1e-5
            scale = float(want[name].abs().max())
            assert float((got[name] - want[name]).abs().max()) <= loose * scale, (mode, name)


def test_bfloat16_input() -> None:
    """bfloat16 states and weights give float32 statistics that know no more rounding."""
    case = make(3)
    got, _ = run(linear_token_stats, cast(case, torch.bfloat16), "hidden")
    same = cast(cast(case, torch.bfloat16), torch.float64)
    want, _ = run(reference.linear_token_stats, same, "hidden")
    assert got.nll.dtype == torch.float32
    assert_close(got.nll, want.nll, "nll", 1e-3)
    assert_close(got.gold_logp, want.gold_logp, "gold_logp", 1e-3)


def test_filter_error_bound() -> None:
    """The filtered gradient is within eps * sum_v |W_v| of the exact one, and eps does filter."""
    case = cast(make(4, vocabulary=2000) | {"gold": None}, torch.float32)
    case["hidden"] = case["hidden"] * 3
    eps = 2.0**-12
    exact, want = run(linear_token_stats, case, "hidden")
    stats, got = run(linear_token_stats, case, "hidden", filter_eps=eps)
    assert torch.allclose(stats.nll, exact.nll, atol=1e-5)
    error = (got["hidden"] - want["hidden"]).abs()
    assert float(error.max()) > 0
    assert bool((error <= 2 * eps * case["weight"].abs().sum(dim=0) + 1e-5).all())


def test_extreme_logits() -> None:
    """Huge logits do not overflow, and tokens that the bias excludes have probability 0."""
    case = cast(make(6), torch.float32)
    case["hidden"] = case["hidden"] * 300
    case["bias"] = torch.zeros(301)
    case["bias"][7:200:3] = -torch.inf
    case["gold"] = None
    keep = torch.ones(301, dtype=torch.bool)
    keep[7:200:3] = False
    case["target"] = torch.nonzero(keep).flatten()[torch.arange(37)]
    got, grads = run(linear_token_stats, case, "hidden")
    want, want_grads = run(reference.linear_token_stats, cast(case, torch.float64), "hidden")
    assert_close(got.nll, want.nll, "nll", 1e-4)
    assert_close(got.entropy, want.entropy, "entropy", 1e-3)
    assert bool(torch.isfinite(grads["hidden"]).all())


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 70),
    width=st.integers(1, 40),
    vocabulary=st.integers(1, 600),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 10_000),
)
def test_any_shape(tokens: int, width: int, vocabulary: int, rows: int | None, seed: int) -> None:
    """Drawn shapes, no token and one token among them."""
    case = make(seed, tokens=tokens, width=width, vocabulary=vocabulary, rows=rows)
    check(case, torch.float32, "hidden", 5e-5)


def test_all_ignored_and_int32_targets() -> None:
    """A batch without a label has loss 0 and gradient 0; int32 is as good as int64."""
    case = cast(make(8), torch.float32)
    case["target"] = torch.full((37,), -100, dtype=torch.int32)
    stats, grads = run(linear_token_stats, case, "hidden")
    assert float(stats.nll.abs().sum()) == 0 and float(grads["hidden"].abs().sum()) == 0


def test_strided_input_and_expanded_gradient() -> None:
    """A transposed hidden, a sliced weight and the expanded gradient of a sum."""
    case = cast(make(9), torch.float32)
    dense = linear_token_stats(**case).nll
    wide = torch.randn(301, 40)
    wide[:, ::2][:, :19] = case["weight"]
    strided = case | {"hidden": case["hidden"].T.contiguous().T, "weight": wide[:, ::2][:, :19]}
    strided["hidden"] = strided["hidden"].requires_grad_()
    nll = linear_token_stats(**strided).nll
    assert torch.allclose(nll, dense, atol=1e-5)
    nll.sum().backward()  # its upstream vector is expanded, with stride 0
    assert strided["hidden"].grad is not None


def test_gradcheck() -> None:
    """The analytical gradient against finite differences, in float64."""
    case = make(10, tokens=6, width=4, vocabulary=23, rows=3)
    case["hidden"].requires_grad_()
    case["weight"].requires_grad_()

    def nll(hidden: Tensor, weight: Tensor) -> Tensor:
        changed = case | {"hidden": hidden, "weight": weight}
        return linear_token_stats(**changed, head_grad="recompute").nll

    assert torch.autograd.gradcheck(nll, (case["hidden"], case["weight"]))


def test_opcheck() -> None:
    """The registration: schema, fake tensors, autograd, tracing."""
    case = cast(make(11), torch.float32)
    gold = case["gold"]
    args = (case["hidden"].requires_grad_(), case["weight"], case["target"].clamp(min=0), None)
    rest = (gold.ids, gold.offsets, gold.problem, None, 0.0, 1.0, -100, 1, 0.0)
    torch.library.opcheck(torch.ops.compact.linear_token_stats.default, (*args, *rest))


def test_compiles_in_one_graph() -> None:
    """torch.compile(fullgraph=True) traces it whole, and a second batch compiles nothing new."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_token_stats(hidden * 2, weight, target).nll.sum()

    graphs = []
    for seed, tokens in ((12, 37), (13, 52), (14, 61)):
        case = cast(make(seed, tokens=tokens), torch.float32)
        hidden = case["hidden"].requires_grad_()
        got = loss(hidden, case["weight"], case["target"])
        got.backward()
        want = linear_token_stats(2 * hidden, case["weight"], case["target"]).nll.sum()
        assert torch.allclose(got, want, rtol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] == graphs[2]


def test_thread_count_changes_no_bit() -> None:
    """One thread and two give the same numbers, bit for bit."""
    case = cast(make(15, tokens=400, width=64, vocabulary=3000), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(linear_token_stats, case, "hidden"))
    finally:
        torch.set_num_threads(before)
    (one, one_grads), (two, two_grads) = results
    assert all(torch.equal(getattr(one, f), getattr(two, f)) for f in FIELDS)
    assert torch.equal(one_grads["hidden"], two_grads["hidden"])


_CAPABILITY = """
import sys; sys.path.insert(0, sys.argv[1])
import torch; torch.set_num_threads(1)
from test_linear_token_stats import check, make
check(make(20, vocabulary=1000), torch.float32, "hidden", 2e-5)
check(make(21, vocabulary=777, width=33), torch.float64, "hidden", 1e-11)
print("ok")
"""


@pytest.mark.parametrize("capability", ["base", "avx2", "avx512"])
def test_every_instruction_set(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each body of the kernels against float64; one that the CPU lacks is refused, not replaced."""
    monkeypatch.setenv("COMPACT_CPU_CAPABILITY", capability)
    with open("/proc/cpuinfo") as f:
        flags = f.read()
    present = capability == "base" or (capability if capability == "avx2" else "avx512f") in flags
    command = [sys.executable, "-c", _CAPABILITY, __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    if present:
        assert done.stdout.strip() == "ok", done.stderr
    else:
        assert done.returncode != 0 and capability in done.stderr


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"target": torch.zeros(36, dtype=torch.int64)}, ValueError, "target must have shape"),
        ({"target": torch.zeros(37)}, TypeError, "target must"),
        ({"weight": torch.zeros(301, 18)}, ValueError, "weight must have shape"),
        ({"hidden": torch.zeros(37)}, ValueError, "hidden must have shape"),
        ({"hidden": torch.zeros(37, 19, dtype=torch.int64)}, TypeError, "hidden must"),
        ({"bias": torch.zeros(300)}, ValueError, "bias must have shape"),
        ({"softcap": -1.0}, ValueError, "softcap must"),
        ({"filter_eps": -0.5}, ValueError, "filter_eps must"),
        ({"head_grad": "fast"}, ValueError, "head_grad must be one of"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Bad arguments raise with the name of the argument, what was expected and what was found."""
    case = cast(make(), torch.float32) | change
    with pytest.raises(error, match=f"^linear_token_stats: {message}.*got"):
        linear_token_stats(**case)


def test_a_trained_head_refuses_frozen() -> None:
    """A mode that would lose a gradient is an error, never a silent zero."""
    case = cast(make(), torch.float32)
    case["weight"].requires_grad_()
    with pytest.raises(ValueError, match="must not be 'frozen'"):
        linear_token_stats(**case, head_grad="frozen")


def test_token_out_of_range() -> None:
    """A target beyond the vocabulary is named, not read."""
    case = cast(make(), torch.float32)
    case["target"][3] = 301
    with pytest.raises((ValueError, RuntimeError), match="301"):
        linear_token_stats(**case)
