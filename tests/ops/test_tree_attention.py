"""Tree attention: any partition of a row, other dtypes, isolation of parts, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from compact_ops import TreeTables, flash_tree, tree_attention
from compact_ops.testing import check
from helpers.flash import stand_in


def partition(
    sizes: list[int], padding: int, shared: int, depth: int, seed: int
) -> dict[str, torch.Tensor]:
    """A part after the other in one row, prefixes anywhere outside of them, several blocks long."""
    g = torch.Generator().manual_seed(seed)
    length = sum(sizes) + padding
    parts, begin = [], 0
    for size in sizes:
        end = begin + size
        low, high = (0, begin) if torch.rand((), generator=g) < 0.5 else (end, length)
        ends = torch.randint(low, high + 1, (2,), generator=g).sort().values.tolist()
        parts.append((0, begin, end, *ends))
        begin = end
    inputs = {
        name: torch.randn(1, length, heads, depth, generator=g, dtype=torch.float64)
        for name, heads in (("query", 2 * shared), ("key", 2), ("value", 2))
    }
    return inputs | {"parts": torch.tensor(parts)}


ANY_PARTITION = given(
    st.builds(
        partition,
        st.lists(st.integers(1, 90), min_size=1, max_size=5),
        st.integers(0, 3),
        st.integers(1, 3),
        st.integers(1, 9),
        st.integers(0, 99),
    )
)


@ANY_PARTITION
def test_any_partition(inputs: dict[str, torch.Tensor]) -> None:
    check("tree_attention", inputs)


# On a GPU: two calls of flash attention, merged.


@ANY_PARTITION
def test_two_flash_calls_equal_the_operator(inputs: dict[str, torch.Tensor]) -> None:
    """The merge and both backwards, in float64, over torch's flash attention for CPUs."""
    parts = inputs.pop("parts")
    tables = TreeTables.of(parts, *inputs["query"].shape[:2])
    found, grad = [], torch.randn(inputs["query"].shape, dtype=torch.float64)
    for each in (parts, tables):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with pytest.MonkeyPatch.context() as patch:
            calls = stand_in(patch)
            out = tree_attention(**leaves, parts=each)
            out.backward(grad)
        found.append([out, *(t.grad for t in leaves.values())])
    assert [c.causal for c in calls] == ([True, False] if tables.to_prefix.longest_key else [True])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_flash_attention_is_called_as_torch_declares_it() -> None:
    """On tensors without memory that say they are on a GPU: arguments, shapes and dtypes."""
    near = TreeTables.of(torch.tensor([[0, 0, 3, 0, 0], [0, 3, 7, 0, 3], [1, 2, 9, 0, 2]]), 2, 9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        heads = {"device": "cuda", "dtype": torch.bfloat16}
        q, k, v = (torch.empty(2, 9, n, 64, **heads) for n in (4, 2, 2))
        tables = near.moved(lambda tensors: [torch.empty_like(t, device="cuda") for t in tensors])
        with pytest.raises(ValueError, match="query on CUDA must be float16 or bfloat16 with D"):
            tree_attention(q.float(), k.float(), v.float(), tables)
        with pytest.raises(ValueError, match="multiple of 8 up to 256, .* D = 60"):
            tree_attention(*(torch.empty(2, 9, 2, 60, **heads) for _ in range(3)), tables)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out, lse = flash_tree._flash_forward(q, k, v, tables.within, 0.125)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (4, 18) and lse.dtype == torch.float32
        found = flash_tree._flash_backward(out, q, k, v, out, lse, tables.within, 0.125)
        assert [d.shape for d in found] == [t.shape for t in (q, k, v)]


def test_tables_of_other_rows_are_refused() -> None:
    inputs = arguments()
    tables = TreeTables.of(inputs["parts"], 2, 9)
    with pytest.raises(ValueError, match="query must be on CUDA with tables, got cpu"):
        tree_attention(**inputs | {"parts": tables})
    wrong = tables._replace(tokens=20)
    with pytest.raises(ValueError, match=r"parts must be tables of B \* L = 18 tokens, got 20"):
        tree_attention(**inputs | {"parts": wrong})
    nothing = {name: inputs[name][:, :0] for name in ("query", "key", "value")}
    assert tree_attention(**nothing, parts=TreeTables.of(inputs["parts"][:0], 2, 0)).numel() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Against the reference in float64, forward and backward."""
    inputs = partition([70, 130, 9, 300], 5, 3, 64, seed=2)
    parts = inputs.pop("parts")
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = {n: t.to(dtype).to(device, kind).requires_grad_() for n, t in inputs.items()}
        out = tree_attention(**leaves, parts=parts.to(device))
        out.backward(torch.ones_like(out))
        found.append([t.detach().double().cpu() for t in (out, *(t.grad for t in leaves.values()))])
    for want, got in zip(*found, strict=True):
        size = want.abs().max()
        assert (got - want).abs().max() < 0.02 * size


def arguments() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 9, 4, 3, generator=g)
    key, value = torch.randn(2, 2, 9, 2, 3, generator=g)
    parts = torch.tensor([[0, 0, 3, 0, 0], [0, 3, 7, 0, 3], [1, 2, 9, 0, 1]])
    return {"query": query, "key": key, "value": value, "parts": parts}


def test_a_part_never_changes_another() -> None:
    """A change in one part does not change a bit of the parts that do not see it."""
    inputs = arguments()
    before = tree_attention(**inputs)
    for name in ("query", "key", "value"):
        inputs[name][0, 3:7] = torch.nan
    after = tree_attention(**inputs)
    assert torch.equal(before[0, :3], after[0, :3]) and torch.equal(before[1], after[1])
    assert after[0, 3:7].isnan().all() and (after[0, 7:] == 0).all() and (after[1, :2] == 0).all()


@pytest.mark.parametrize("at", [3, 5, 9])
def test_an_empty_prefix_may_lie_anywhere(at: int) -> None:
    """Inside of the part too."""
    inputs = arguments()
    inputs["parts"][1, 3:] = 0
    want = tree_attention(**inputs)
    inputs["parts"][1, 3:] = at
    assert torch.equal(tree_attention(**inputs), want)
    assert TreeTables.of(inputs["parts"], 2, 9).to_prefix.longest_query == 7


@pytest.mark.parametrize("count", [0, 9])
def test_nothing_to_attend(count: int) -> None:
    """Rows without tokens, and rows without parts: zeros, and zero gradients."""
    inputs = arguments() | {"parts": torch.zeros(0, 5, dtype=torch.int64)}
    for name in ("query", "key", "value"):
        inputs[name] = inputs[name][:, :count].requires_grad_()
    out = tree_attention(**inputs)
    out.sum().backward()
    assert out.shape == (2, count, 4, 3) and not out.any()
    assert all(not inputs[name].grad.any() for name in ("query", "key", "value"))


def test_large_products_do_not_overflow() -> None:
    """Large products do not overflow: the largest one of a row is subtracted first."""
    inputs = arguments()
    inputs["query"] = inputs["query"] * 1000
    check("tree_attention", inputs, ulps=2000)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"query": torch.zeros(2, 9, 4)}, ValueError, r"query must have shape \[B, L, Hq, D\]"),
        ({"query": torch.zeros(2, 9, 3, 3)}, ValueError, "query must have a multiple of the 2"),
        ({"key": torch.zeros(2, 8, 2, 3)}, ValueError, "key must have shape"),
        ({"value": torch.zeros(2, 9, 4, 3)}, ValueError, "value must have shape"),
        ({k: torch.zeros(2, 9, 0, 3) for k in ("key", "value")}, ValueError, "key must have at"),
        ({k: torch.zeros(2, 9, 2, 0) for k in ("query", "key", "value")}, ValueError, "query must"),
        ({"key": torch.zeros(2, 9, 2, 3).double()}, TypeError, "key must have dtype float32"),
        ({"parts": torch.zeros(3, 4).long()}, ValueError, r"parts must have shape \[N, 5\]"),
        ({"parts": torch.zeros(3, 5)}, TypeError, "parts must have dtype int64 or int32"),
        ({"scale": torch.nan}, ValueError, "scale must be finite"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each error names the argument, what was expected and what was found."""
    with pytest.raises(error, match=f"^tree_attention: {message}.*got"):
        tree_attention(**arguments() | change)


@pytest.mark.parametrize(
    "part,message",
    [
        ((2, 0, 3, 0, 0), r"parts\[1, 0\] must be a row in \[0, 2\), got 2"),
        ((0, 4, 4, 0, 0), r"parts\[1, 1:3\] must be a span .* got 4 to 4"),
        ((0, 4, 10, 0, 0), r"parts\[1, 1:3\] must be a span .* got 4 to 10"),
        ((0, 4, 6, 5, 7), r"parts\[1, 3:5\] must be a span .* outside of the part, got 5 to 7"),
        ((0, 4, 6, 2, 1), r"parts\[1, 3:5\] must be a span .* got 2 to 1"),
        ((0, 2, 6, 0, 1), r"parts\[1\] must not overlap another part, got token 2 twice"),
    ],
)
def test_bad_parts(part: tuple[int, ...], message: str) -> None:
    """A part out of range, or one that overlaps another, raises an error that names it."""
    inputs = arguments()
    inputs["parts"][1] = torch.tensor(part)
    with pytest.raises(RuntimeError, match=f"tree_attention: {message}"):
        tree_attention(**inputs)
    with pytest.raises(RuntimeError, match=f"tree_attention: {message}"):
        TreeTables.of(inputs["parts"], *inputs["query"].shape[:2])
