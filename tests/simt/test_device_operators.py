"""Every operator against float64, on the CPU, in the host harness and (marked cuda) on a GPU."""

from __future__ import annotations

import subprocess

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compact_ops import STATISTICS, reference
from compact_ops.types import GoldAnswers

EPS = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def close(got, want, dtype, factor=1.0):
    got, want = got.cpu().double(), want.double()
    scale = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0)
    torch.testing.assert_close(
        got, want, rtol=0, atol=factor * EPS[dtype] * scale, equal_nan=True
    )  # fmt: skip


def asked(tokens, vocabulary, columns=3):
    """(score_ids, the flags that ask for rank, sum_p2 and margin); every third id is absent."""
    ids = torch.arange(tokens * columns).mul(7919).remainder(vocabulary).view(tokens, columns)
    ids[:, 1::3] = -1
    return ids, (True, True, True)


def compare_statistics(found, want, dtype, some=slice(None)):
    """The ten statistics of a head operator against the reference's."""
    exact = dtype in (torch.float32, torch.float64)
    truth = [*want[:6], want.rank, want.sum_p2, want.margin, want.score_logp]
    for got, true in zip(found, truth, strict=True):
        if got.is_floating_point():
            close(got, true[some].detach(), dtype)
        elif exact:
            assert torch.equal(got.cpu(), true[some])
    assert torch.equal(found[3], found[6] == 1)  # correct, rank


def case(dtype, tokens, width, vocabulary, full, seed=0):
    """Inputs of a head in `dtype`, and the same in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=g).to(dtype) if full else None
    target = torch.randint(0, vocabulary, (tokens,), generator=g)
    target[1::3] = -100
    gold = GoldAnswers(
        torch.randint(0, vocabulary, (7,), generator=g),
        torch.tensor([0, 3, 7]),
        torch.randint(0, 2, (tokens,), generator=g),
    )
    softcap, scale = (4.0, 0.8) if full else (None, 1.0)
    return hidden, weight, bias, target, gold, softcap, scale


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("shape", [(5, 7, 33), (40, 16, 1000), (1, 3, 1), (0, 4, 9)])
def test_statistics_and_gradients_of_the_head(impl, shape, dtype, full):
    ops, to = impl
    tokens, width, vocabulary = shape
    hidden, weight, bias, target, gold, softcap, scale = case(dtype, *shape, full)
    upstream = torch.linspace(0.5, 2, tokens).double()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    b64 = bias.double().requires_grad_() if full else None
    ids, flags = asked(tokens, vocabulary)
    want = reference.linear_token_stats(
        h64, w64, target, gold=gold, bias=b64, softcap=softcap, logit_scale=scale,
        statistics=STATISTICS, score_ids=ids,
    )  # fmt: skip
    leaves = [h64, w64] + ([b64] if full else [])
    grads = torch.autograd.grad((want.nll * upstream).sum(), leaves, retain_graph=True)
    unit = torch.autograd.grad(want.nll.sum(), h64)[0]
    args = [to(hidden), to(weight), to(target), None, *(to(t) for t in gold), to(bias), to(ids)]
    out = ops.linear_token_stats(*args, softcap or 0.0, scale, -100, 3, 0.0, *flags)
    compare_statistics(out[:10], want, dtype)
    close(out[10], unit, dtype)
    stashed = ops.linear_token_stats(*args, softcap or 0.0, scale, -100, 2, 0.0, *flags)
    assert len(stashed[10]) == 0 and torch.equal(stashed[11], out[11])
    plain = ops.linear_token_stats(
        *args[:-1], None, softcap or 0.0, scale, -100, 3, 0.0, False, False, False
    )
    assert all(torch.equal(a, b) for a, b in zip(plain[:6], out[:6], strict=True))
    assert [x.numel() for x in plain[6:10]] == [0] * 4 and torch.equal(plain[10], out[10])
    nll, lse = out[:2]
    up = to(upstream.to(nll.dtype))
    head = [to(hidden), to(weight), to(target), None, to(bias), nll, lse]
    tail = [softcap or 0.0, scale, -100, 0.0]
    again = ops.linear_token_stats_backward(up, *head, None, None, *tail, True, True, full)
    stashed = ops.linear_token_stats_backward(up, *head, *out[11:], *tail, False, True, full)
    close(again[0], grads[0], dtype)
    for result, coarse in ((again, dtype), (stashed, torch.bfloat16)):
        close(result[1], grads[1], max(dtype, coarse, key=EPS.get))
        if full:
            close(result[2], grads[2], max(dtype, coarse, key=EPS.get))


def test_a_token_without_gradient_adds_nothing(impl):
    """Logits that are not finite with weight 0, and an ignored token with a weight of NaN."""
    ops, to = impl
    hidden, weight, bias, target, _, _, _ = case(torch.float32, 5, 6, 40, True)
    live, upstream = target != -100, torch.tensor([1.0, torch.nan, 2.0, 0.0, torch.nan])
    weight *= 1e20
    some = live & (upstream != 0)
    hidden[~some] = 1e20
    hidden[some] *= 1e-20
    h, w, b, t, up = (to(x) for x in (hidden, weight, bias, target, upstream))
    numbers = (0.0, 1.0, -100)
    out = ops.linear_token_stats(
        h, w, t, None, None, None, None, b, None, *numbers, 3, 0.0, False, False, False
    )
    nll, lse, stash = out[0], out[1], out[11:]
    assert not bool(lse[3].isfinite())
    head = (up, h, w, t, None, b, nll, lse)
    again = ops.linear_token_stats_backward(*head, None, None, *numbers, 0.0, True, True, True)
    stashed = ops.linear_token_stats_backward(*head, *stash, *numbers, 0.0, False, True, True)
    blocks = to(torch.empty(5, 40))
    fused = ops.linear_token_stats_fused(
        blocks, h, w, t, None, None, None, b, None, *numbers, 0.0, True, False, False, False
    )
    sums = to(torch.zeros(40, 6)), to(torch.zeros(40))
    ops.linear_token_stats_fused_backward(*sums, blocks, up, h, t, *fused[:2], fused[-1], *numbers)
    assert torch.equal(up.cpu().isnan(), upstream.isnan())  # an input
    unit, rows = to(torch.tensor([[torch.nan], [2.0]])), to(torch.zeros(2, dtype=torch.int64))
    some_weight = to(torch.tensor([0.0, 3.0]))
    assert ops.accumulate_weighted(unit, rows, some_weight, None, 1).item() == 6
    logits = to(hidden @ weight.T)
    ops.row_stats_(logits, t, up, None, None, None, b, *numbers)
    assert int(logits[to(~some)].abs().sum()) == int(again[0][to(~some)].abs().sum()) == 0
    h64, w64, b64 = (x.double().requires_grad_() for x in (hidden[some], weight, bias))
    want = reference.linear_token_stats(h64, w64, target[some], bias=b64)
    grads = torch.autograd.grad((want.nll * upstream[some]).sum(), (w64, b64))
    for result, dtype in ((again[1:], torch.float32), (stashed[1:], torch.bfloat16),
                          (sums, torch.float32)):  # fmt: skip
        for got, true in zip(result, grads, strict=True):
            close(got, true, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_results(impl, dtype):
    """float32, or float64 for float64."""
    ops, to = impl
    wide = torch.promote_types(dtype, torch.float32)
    rows, some = to(torch.randn(3, 64).to(dtype)), to(torch.randn(64, 8).to(dtype))
    one, index = to(torch.ones(3, dtype=dtype)), to(torch.arange(3))
    found = (
        ops.filtered_matmul(rows, some, 0.1),
        ops.accumulate_weighted(rows, index, one, None, 3),
        *ops.problem_weights(rows, to(torch.tensor([0, 64])), one, one, 1.0, 0, 0.0, 0.0),
    )
    assert {x.dtype for x in found} == {wide}
    product = rows.cpu().double() @ some.cpu().double()
    close(ops.filtered_matmul(rows, some, 0.0), product, torch.float32)


def test_equal_scores_differ_from_their_rounded_mean(impl):
    """z is 0, and a NaN among equal scores is seen."""
    ops, to = impl
    scores = torch.full((2, 7), 0.1)
    scores[1, 4] = torch.nan
    args = [to(torch.tensor([0, 7])), to(torch.ones(2)), to(torch.zeros(2)), 1.0, 0, 0.0, 0.0]
    weight, z = ops.problem_weights(to(scores), *args)
    assert int(z[0].abs().sum()) == 0 and bool(z[1].isnan().all() & weight.isnan().all())


@pytest.mark.parametrize("offsets", [[0, 2, 9], [2, 4], [0, 4, 3, 6], [-1, 6]])
def test_what_wrong_offsets_leave_out_is_nan(impl, offsets):
    """A CPU raises an error; elsewhere the host does not know the offsets."""
    ops, to = impl
    scores = to(torch.arange(12.0).view(2, 6))
    args = [to(torch.tensor(offsets)), to(torch.ones(2)), to(torch.ones(2)), 1.0, 0, 0.0, 0.0]
    if ops is torch.ops.compact and not scores.is_cuda:
        with pytest.raises(RuntimeError, match="problem_weights: offsets"):
            ops.problem_weights(scores, *args)
        return
    covered = torch.zeros(6, dtype=torch.bool)
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        if 0 <= begin < end <= 6:
            covered[begin:end] = True
    for found in ops.problem_weights(scores, *args):
        assert torch.equal(found.isfinite().cpu(), covered.expand(found.shape))


def test_repeated_rows_and_the_filter(impl):
    ops, to = impl
    hidden, weight, _, _, _, _, _ = case(torch.float32, 9, 12, 300, False)
    rows = torch.tensor([3, 3, 0, 8, 3])
    target = torch.tensor([1, 299, -100, 7, 0])
    args = [to(hidden), to(weight * 8), to(target), to(rows), None, None, None, None, None]
    flags = (False, False, False)
    exact = ops.linear_token_stats(*args, 0.0, 1.0, -100, 1, 0.0, *flags)
    sparse = ops.linear_token_stats(*args, 0.0, 1.0, -100, 1, 1e-4, *flags)
    want = reference.linear_token_stats(hidden.double(), weight.double() * 8, target, rows=rows)
    close(exact[0], want.nll, torch.float32)
    bound = 1e-4 * (weight * 8).abs().sum(0)
    assert torch.all((exact[10] - sparse[10]).abs().cpu() <= bound + 1e-5)
    assert not torch.equal(exact[10], sparse[10])


def test_rank_and_margin_of_ties(impl):
    """Whole numbers, so that logits are exact: ties, a NaN, an excluded and an ignored target."""
    ops, to = impl
    g = torch.Generator().manual_seed(5)
    hidden = torch.randint(-2, 3, (50, 4), generator=g).float()
    weight = torch.randint(-2, 3, (777, 4), generator=g).float()
    bias = torch.zeros(777)
    bias[::5] = -torch.inf
    target = torch.randint(0, 777, (50,), generator=g)
    target[3], target[4], hidden[5] = -100, 5, torch.nan
    args = [to(hidden), to(weight), to(target), None, None, None, None, to(bias), None]
    out = ops.linear_token_stats(*args, 0.0, 1.0, -100, 0, 0.0, True, False, True)
    want = reference.linear_token_stats(
        hidden, weight, target, bias=bias, statistics=STATISTICS[::2]
    )
    assert torch.equal(out[6].cpu(), want.rank) and int(out[6][3]) == int(out[6][5]) == 0
    torch.testing.assert_close(out[8].cpu(), want.margin, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(out[3].cpu(), out[6].cpu() == 1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_weights_chunk_by_chunk(impl, dtype, full):
    ops, to = impl
    hidden, weight, bias, target, gold, softcap, scale = case(dtype, 23, 12, 700, full)
    upstream = torch.linspace(-1, 2, 23).to(dtype)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    b64 = bias.double().requires_grad_() if full else None
    ids, flags = asked(23, 700)
    want = reference.linear_token_stats(
        h64, w64, target, gold=gold, bias=b64, softcap=softcap, logit_scale=scale,
        statistics=STATISTICS, score_ids=ids,
    )  # fmt: skip
    leaves = [w64] + ([b64] if full else [])
    grads = torch.autograd.grad((want.nll * upstream).sum(), leaves, retain_graph=True)
    units = torch.autograd.grad(want.nll.sum(), h64)[0]
    blocks = to(torch.empty(10, 700, dtype=dtype))
    d_weight = to(torch.zeros(700, 12, dtype=dtype))
    d_bias = to(torch.zeros(700 if full else 0, dtype=dtype))
    tail = (softcap or 0.0, scale, -100)
    for some in (slice(0, 10), slice(10, 20), slice(20, 23)):
        read, where = to(hidden[some]), to(target[some])
        golds = (to(gold.ids), to(gold.offsets), to(gold.problem[some]))
        *stats, unit, shift = ops.linear_token_stats_fused(
            blocks,
            read,
            to(weight),
            where,
            *golds,
            to(bias),
            to(ids[some]),
            *tail,
            0.0,
            True,
            *flags,
        )
        compare_statistics(stats, want, dtype, some)
        close(unit, units[some], dtype)
        ops.linear_token_stats_fused_backward(
            d_weight, d_bias, blocks, to(upstream[some]), read, where, *stats[:2], shift, *tail
        )
    close(d_weight, grads[0], dtype)
    if full:
        close(d_bias, grads[1], dtype)


@pytest.mark.parametrize("dtype", list(EPS))
def test_row_stats_in_place(impl, dtype):
    ops, to = impl
    logits = torch.randn(6, 515, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    logits[2, 5:400] = -torch.inf
    target = torch.tensor([0, 514, 3, -100, 7, 8])
    weight = torch.linspace(0.5, 2, 6)
    exact = logits.double().clone()
    want = reference.row_stats_(exact, target, weight=weight.double())
    mine = to(logits.clone())
    got = ops.row_stats_(mine, to(target), to(weight), None, None, None, None, 0.0, 1.0, -100)
    for a, b in zip(got[:3], want[:3], strict=True):
        close(a, b, dtype)
    assert torch.equal(got[3].cpu(), want.correct)
    close(mine, exact, dtype)


@pytest.mark.parametrize("ignored", ["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows,cols,shift",
    [(0, 9, 0), (1, 1, 1), (10_000, 1_003, 1), (3, 262_144, 0), (3, 262_143, 1), (70_001, 5, 3),
     (3, 12_288, 0), (3, 24_576, 0)],
)  # fmt: skip
def test_row_stats_at_every_size(impl, rows, cols, shift, dtype, ignored):
    """Misaligned rows (by `shift` elements), excluded classes, grids over 65,535.

    Rows of 48 KiB: with the kernel's own arrays they are more than a block has by default.
    """
    ops, to = impl
    if ops is torch.ops.compact_simt:
        rows = min(rows, 50)  # simt_kernels plays all of them
    g = torch.Generator().manual_seed(rows)
    flat = torch.randn(rows * cols + shift, generator=g).mul(3).to(dtype)
    target = torch.randint(0, cols, (rows,), generator=g)
    values = flat[shift:].view(rows, cols)
    aim = values.gather(1, target[:, None])
    values[:, ::3] = -torch.inf
    values.scatter_(1, target[:, None], aim)
    target[:: 1 if ignored == "all" else 7] = -100
    exact = values.double()
    want = reference.row_stats_(exact, target)
    mine = to(flat)[shift:].view(rows, cols)
    got = ops.row_stats_(mine, to(target), None, None, None, None, None, 0.0, 1.0, -100)
    for a, b in zip(got[:3], want[:3], strict=True):
        close(a, b, torch.float32)
    assert torch.equal(got[3].cpu(), want.correct)
    close(mine, exact, dtype)


FOUR = torch.combinations(torch.arange(4)).T  # all pairs of four rows


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "left, right",
    [
        ([0, 1, 1, 5], [2, 3, 4, 5]),
        # More rows than a tile has, each in three pairs, in another order than the rows'.
        [(torch.arange(36).flip(0)[::4, None] - rows).flatten().tolist() for rows in FOUR],
        ([0] * 35, list(range(1, 36))),  # one component, larger than a tile
        ([], []),
    ],
)
def test_pairwise_symmetric_kl(impl, left, right, full):
    ops, to = impl
    left, right = (torch.tensor(rows, dtype=torch.int64) for rows in (left, right))
    hidden, weight, bias, _, _, softcap, scale = case(torch.float32, 36, 9, 700, full)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    b64 = bias.double().requires_grad_() if full else None
    want = reference.pairwise_symmetric_kl(
        h64, w64, left, right, bias=b64, softcap=softcap, logit_scale=scale
    )
    up = torch.linspace(-2.0, 3.0, len(left))
    leaves = [h64, w64] + ([b64] if full else [])
    grads = torch.autograd.grad((want * up.double()).sum(), leaves)
    args = [to(hidden), to(weight), left, right, to(bias)]
    known = ops.pairwise_symmetric_kl(*args, softcap or 0.0, scale)
    close(known[0] + known[1], want.detach(), torch.float32)
    got = ops.pairwise_symmetric_kl_backward(
        to(up), *args, *known, softcap or 0.0, scale, True, True, full
    )
    for a, b in zip(got, grads, strict=False):
        close(a, b, torch.float32)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_small_operators_at_any_shape(impl, data):
    ops, to = impl
    items = data.draw(st.integers(0, 40))
    width = data.draw(st.integers(1, 40))
    num_rows = data.draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    unit = torch.randn(items, width, generator=g)
    rows = torch.randint(0, num_rows, (items,), generator=g)
    weight = torch.randn(4, generator=g)
    group = torch.randint(0, 4, (items,), generator=g)
    got = ops.accumulate_weighted(to(unit), to(rows), to(weight), to(group), num_rows)
    want = reference.accumulate_weighted(unit.double(), rows, weight.double(), group, num_rows)
    close(got, want, torch.float32)

    grad = torch.randn(num_rows, items + 1, generator=g)
    matrix = torch.randn(items + 1, width, generator=g)
    # A power of two: float32 and float64 round the same entries.
    got = ops.filtered_matmul(to(grad), to(matrix), 0.5)
    close(got, reference.filtered_matmul(grad.double(), matrix.double(), 0.5), torch.float32)

    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    scores = torch.randn(3, int(offsets[-1]), generator=g)
    beta, prior = torch.tensor([1.0, 1.0, -0.5]), torch.tensor([0.1, 0.2, 0.3])
    got = ops.problem_weights(to(scores), to(offsets), to(beta), to(prior), 0.8, 1, 0.0, 0.1)
    want = reference.problem_weights(
        scores.double(), offsets, beta.double(), prior.double(), tau=0.8, ddof=1, floor=0.1
    )
    close(got[0], want.weight, torch.float32)
    close(got[1], want.zscores, torch.float32)


def test_kernels_in_the_harness(simt_folder):
    done = subprocess.run(
        [simt_folder / "simt_kernels", "fibers", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
