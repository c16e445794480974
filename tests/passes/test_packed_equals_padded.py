"""A problem packed as a tree gives what one padded row a rationale gives, in value and gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from compact.passes import Batch, EncodedProblem
from compact.passes import attention as trees
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact_ops import TreeTables, tree_attention
from helpers.flash import stand_in
from helpers.toy import _SIZES, CONFIGS, VOCABULARY, make_model, make_problem


def outcome(
    model: nn.Module,
    problems: list[EncodedProblem],
    layout: str,
    capacity: int = 0,
    limit: int | None = None,
) -> tuple[dict[str, Tensor], Batch]:
    """Statistics, and gradients of a loss that weighs every token differently."""
    student = Student.of(model)
    batch = build_batch(
        problems,
        layout=layout,
        leaves=True,
        pad_token_id=0,
        row_capacity=capacity,
        row_limit=limit,
    )
    live, hidden, pass_ = run_pass(student, batch)
    hidden.retain_grad()
    model.zero_grad()
    (live.nll * torch.linspace(0.5, 1.5, len(live.nll))).sum().backward()
    found = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    stats = {"nll": live.nll, "gold_logp": live.gold_logp, "leaf_logp": pass_.leaf_logp}
    at_tokens = hidden.detach().flatten(0, 1)[batch.token_rows]
    return {**stats, "hidden": at_tokens, **found}, batch


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [[9], [7, 12], [4, 9, 6, 13, 2]])
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_padded(kind: str, lengths: list[int], checkpointing: bool) -> None:
    """K = 1, 2, 5 of unequal lengths, alone and with a second problem in the same row."""
    model = make_model(kind, checkpointing)
    problems = [make_problem(1, lengths), make_problem(2, [5, 8], prompt=3)]
    want, _ = outcome(model, problems, "padded")
    for capacity in (0, 256):
        got, batch = outcome(model, problems, "tree", capacity)
        assert batch.main.input_ids.shape[0] == (2 if capacity == 0 else 1)
        assert got.keys() == want.keys() and len(want) > 8
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_several_rows_equal_one(kind: str, checkpointing: bool) -> None:
    """A problem packed over 2 to 4 rows, one of them shared with another problem."""
    model = make_model(kind, checkpointing)
    problems = [make_problem(1, [9, 14, 6, 11]), make_problem(2, [5, 8], prompt=3)]
    want, one = outcome(model, problems, "tree")
    assert len(one.main.input_ids) == 2
    for limit, capacity, lengths in (
        (30, 0, [30, 20, 16]),
        (30, 36, [30, 36]),
        (19, 0, [19, 16, 16, 14, 11]),
        (10, 0, [19, 16, 14, 11, 11, 8]),  # no room for a rationale: each has its own row
    ):
        got, batch = outcome(model, problems, "tree", capacity, limit)
        assert batch.main.attention_mask.sum(dim=1).tolist() == lengths
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
        for name in ("target", "rationale", "problem", "leaf_step", "leaf_index", "question_leaf"):
            assert torch.equal(getattr(batch, name), getattr(one, name))


def test_rows_without_a_limit_are_as_before() -> None:
    """A limit that a problem keeps changes no bit of the batch."""
    problems = [make_problem(1, [9, 14, 6]), make_problem(2, [5, 8], prompt=3)]
    one, two = (
        build_batch(problems, layout="tree", leaves=True, pad_token_id=0, row_limit=limit)
        for limit in (None, 34)
    )
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(two, name)), name
    assert torch.equal(one.main.input_ids, two.main.input_ids)


@pytest.mark.parametrize(("checkpointing", "kept"), [(False, 1 << 26), (True, 0), (True, 1 << 26)])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_leaves_in_blocks_equal_one_mask(
    kind: str, checkpointing: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves of long rows, in blocks of 3 queries that no border of a leaf respects."""
    model = make_model(kind, checkpointing)
    problems = [make_problem(1, [12, 9, 15], steps=4), make_problem(2, [5, 8], prompt=3)]
    masks = []
    mask = trees._mask
    monkeypatch.setattr(trees, "_mask", lambda *a, **k: masks.append(k) or mask(*a, **k))
    for capacity in (0, 256):
        want, _ = outcome(model, problems, "tree", capacity)
        assert masks and {"leaves": True} in masks
        with monkeypatch.context() as patch:
            patch.setattr(trees, "LEAF_PAIRS", 0)
            patch.setattr(trees, "LEAF_QUERIES", 3)
            patch.setattr(trees, "KEPT_PAIRS", kept)
            masks.clear()
            got, _ = outcome(model, problems, "tree", capacity)
            assert {"leaves": True} not in masks
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_checkpointed_layers_run_again_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs of a layer use tree_attention; the gradients are those without checkpointing."""
    calls = []
    monkeypatch.setattr(
        trees, "tree_attention", lambda *args: calls.append(args) or tree_attention(*args)
    )
    problems = [make_problem(1, [4, 9, 6])]
    want, _ = outcome(make_model("llama"), problems, "tree")
    assert len(calls) == 2
    calls.clear()
    model = make_model("llama", checkpointing=True)
    got, _ = outcome(model, problems, "tree")
    assert len(calls) == 4
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_flash_attention_of_a_gpu_gives_the_same(
    kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer two calls, here of torch's flash attention for CPUs; leaves in blocks."""
    model = make_model(kind, checkpointing)
    problems = [make_problem(1, [12, 9, 15], steps=4), make_problem(2, [5, 8], prompt=3)]
    for capacity in (0, 256):
        want, _ = outcome(model, problems, "tree", capacity)
        with monkeypatch.context() as patch:
            calls = stand_in(patch)
            patch.setattr(
                trees,
                "_parts",
                lambda _, batch: TreeTables.of(batch.parts, *batch.main.input_ids.shape),
            )
            patch.setattr(trees, "LEAF_PAIRS", 0)
            got, _ = outcome(model, problems, "tree", capacity)
        layers = model.config.num_hidden_layers
        assert len(calls) == 2 * layers * (2 if checkpointing else 1)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_autocast(kind: str) -> None:
    """As a recipe with `bf16: true` trains: q and k come as float32, v as bfloat16."""
    model = make_model(kind)
    problems = [make_problem(1, [4, 9, 6])]
    exact, _ = outcome(model, problems, "tree")
    with torch.autocast("cpu", torch.bfloat16):
        tree, _ = outcome(model, problems, "tree")
        padded, _ = outcome(model, problems, "padded")
    for name in exact:
        size = exact[name].abs().max()
        assert (tree[name] - exact[name]).abs().max() < 0.05 * size, name
        assert (padded[name] - exact[name]).abs().max() < 0.05 * size, name
    assert not torch.equal(tree["nll"], exact["nll"])


def test_hidden_gradient_agrees() -> None:
    """The gradient of the final hidden states, accumulated over the shared prompt row."""
    model = make_model("llama")
    problem = make_problem(3, [6, 9, 4])
    sums = []
    for layout in ("tree", "padded"):
        batch = build_batch([problem], layout=layout, leaves=False, pad_token_id=0)
        live, hidden, _ = run_pass(Student.of(model), batch)
        hidden.retain_grad()
        live.nll.sum().backward()
        grad = hidden.grad.flatten(0, 1)
        prompt = grad[batch.prompt_rows.unique()].sum(dim=0)
        inner = grad[batch.token_rows[:-1]]
        sums.append((prompt, inner))
    for tree, padded in zip(*sums, strict=True):
        torch.testing.assert_close(tree, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_leaves_equal_a_forward_of_that_very_prefix(kind: str) -> None:
    """log p(gold) after each step, against a separate forward of prompt + steps + cue + gold."""
    model = make_model(kind).eval()
    problem = make_problem(4, [8, 11])
    got, batch = outcome(model, [problem], "tree")
    want = []
    prefixes = [problem.prompt_ids + r.ids[:end] for r in problem.rationales for _, end in r.steps]
    for prefix in [*prefixes, problem.prompt_ids]:
        ids = torch.tensor([[*prefix, *problem.cue_ids, *problem.gold_ids]])
        logp = model(input_ids=ids).logits[0].log_softmax(dim=1)
        at = torch.arange(len(problem.gold_ids)) + ids.shape[1] - len(problem.gold_ids)
        want.append(logp[at - 1, ids[0, at]].mean().item())
    torch.testing.assert_close(got["leaf_logp"], torch.tensor(want), rtol=1e-4, atol=1e-4)
    assert int(batch.question_leaf[0]) == len(prefixes)


_MODEL = make_model("llama").eval()


@settings(max_examples=15)
@given(seed=st.integers(0, 999), branch=st.integers(0, 2), place=st.integers(0, 3))
def test_a_branch_never_changes_another(seed: int, branch: int, place: int) -> None:
    """Another token in one branch leaves every number of the others as it was, bit for bit."""
    problem = make_problem(seed, [6, 8, 5])
    changed = problem.rationales[branch]
    ids = list(changed.ids)
    ids[place] = ids[place] % (VOCABULARY - 1) + 1
    rationales = list(problem.rationales)
    rationales[branch] = replace(changed, ids=tuple(ids))
    other = replace(problem, rationales=tuple(rationales))
    (one, batch), (two, _) = (outcome(_MODEL, [p], "tree") for p in (problem, other))
    same = batch.rationale != branch
    assert torch.equal(one["nll"][same], two["nll"][same])
    assert not torch.equal(one["nll"][~same], two["nll"][~same])
    leaf_of = torch.repeat_interleave(torch.arange(3), batch.leaf_offsets.diff())
    others = torch.cat([leaf_of != branch, torch.ones(1, dtype=torch.bool)])
    assert torch.equal(one["leaf_logp"][others], two["leaf_logp"][others])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_tree_attention_equals_one_mask(
    kind: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student with tree_attention in every layer against one mask over the row.

    With dropout in the attention there is one mask both times: the same seed, the same numbers.
    """
    model = make_model(kind)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    calls = []
    monkeypatch.setattr(
        trees, "tree_attention", lambda *args: calls.append(args) or tree_attention(*args)
    )
    problems = [make_problem(1, [4, 9, 6]), make_problem(2, [5, 8], prompt=3)]
    for capacity in (0, 256):  # a row a problem, one of them padded; both in one row
        found = []
        for parts in (trees._parts, lambda *_: None):
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(trees, "_parts", parts)
                torch.manual_seed(0)
                found.append(outcome(model, problems, "tree", capacity)[0])
            assert len(calls) == (2 if dropout == 0 and parts is trees._parts else 0)
        got, want = found
        assert got.keys() == want.keys() and len(want) > 8
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_tree_longer_than_the_window_is_refused() -> None:
    """Its mask would take the place of the window; padded rows keep the window."""
    config = Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    student = Student.of(AutoModelForCausalLM.from_config(config).eval())
    assert student.attention_window == 16

    def batch(lengths: list[int], layout: str, leaves: bool = False) -> Batch:
        problem = make_problem(1, lengths)
        return build_batch([problem], layout=layout, leaves=leaves, pad_token_id=0)

    run_pass(student, batch([11, 11, 4], "tree"))  # 5 + 11 tokens reach over 16
    with pytest.raises(ValueError, match="question_id 'q1'.* at most 16 .* got 17; set layout"):
        run_pass(student, batch([12, 4], "tree"))
    with pytest.raises(ValueError, match="got 18;"):  # the leaf, not the rationale
        run_pass(student, batch([11, 4], "tree", leaves=True))
    problem = make_problem(1, [20])
    got = run_pass(student, batch([20], "padded"))[0].nll
    logits = student.model(input_ids=torch.tensor([problem.prompt_ids + problem.rationales[0].ids]))
    want = logits.logits[0, 4:-1].log_softmax(1)[torch.arange(20), list(problem.rationales[0].ids)]
    torch.testing.assert_close(got, -want, rtol=1e-4, atol=1e-4)


def test_flex_attention_equals_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of long rows on CUDA, run on the CPU without its compiler (forward only there)."""
    student = Student.of(make_model("llama").eval())
    problems = [make_problem(1, [6, 9]), make_problem(2, [4])]
    batch = build_batch(problems, layout="tree", leaves=True, pad_token_id=0)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        want = run_pass(student, batch)[2]
        monkeypatch.setattr(trees, "_attention_of", lambda *_: "flex_attention")
        got = run_pass(student, batch)[2]
    assert student.config._attn_implementation == "sdpa"  # as before
    torch.testing.assert_close(got.stats.nll, want.stats.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.leaf_logp, want.leaf_logp, rtol=1e-4, atol=1e-5)


def test_flex_attention_is_for_long_rows_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(length: int, *, cuda: bool = True, checkpointing: bool = False) -> str:
        device = torch.device("cuda" if cuda else "cpu")
        ids = SimpleNamespace(is_cuda=cuda, shape=(2, length), device=device)
        batch = SimpleNamespace(main=SimpleNamespace(input_ids=ids))
        return trees._attention_of(Student.of(make_model("llama", checkpointing)), batch)

    assert attention(trees.FLEX_FROM + 1) == "flex_attention"
    assert attention(trees.FLEX_FROM) == "sdpa"
    assert attention(trees.FLEX_FROM + 1, cuda=False) == "sdpa"
    # FlexAttention has not been tried on a GPU with gradient checkpointing.
    assert attention(trees.FLEX_FROM + 1, checkpointing=True) == "sdpa"
    monkeypatch.setattr(trees, "flash_supports", lambda device, dtype, depth: depth == 8)
    assert attention(trees.FLEX_FROM + 1) == "sdpa"
