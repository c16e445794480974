"""The smaller operators at the sizes of a training step, compared with plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import compact_ops
from benchmarks.harness import Args, Outputs, Provider, Skipped
from compact_ops import ProblemWeights, reference

TITLE = "The smaller operators"
LEGEND = (
    "Each operator of compact_ops that no other case measures, against plain torch, which for "
    "`filtered_matmul` gets its random choices made beforehand. The formulas are in "
    "docs/operators.md."
)
SHAPES = (
    {"op": "row_stats_", "R": 256, "V": 49152, "H": 576},
    {"op": "filtered_matmul", "R": 256, "V": 49152, "H": 576},
    {"op": "accumulate_weighted", "R": 4096, "V": 1024, "H": 576},
    {"op": "problem_weights", "R": 4096, "V": 1024, "H": 576},
    {"op": "head_divergence", "R": 512, "V": 49152, "H": 576},
)
# A hundredth of normal entries is rounded to THRESHOLD and not to 0: what a trained student's
# softmax gradients are like.
THRESHOLD = 80.0


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """COMPACT's operator and plain torch; R rows (tokens, scores), V the vocabulary or groups."""
    op = str(args.shape["op"])
    if op not in _CALLS:
        raise ValueError(f"--shape: op must be one of {', '.join(_CALLS)}, got {op!r}")
    rows, vocabulary, width = (int(args.shape[key]) for key in ("R", "V", "H"))
    generator = torch.Generator().manual_seed(args.seed)
    calls = _CALLS[op](rows, vocabulary, width, args, generator)
    expected = functools.cache(calls[2])
    rtol = 1e-4 if args.dtype != torch.bfloat16 else 3e-2
    return {
        "compact": Provider(calls[0], expected, rtol),
        "torch": Provider(calls[1], expected, rtol),
    }


Calls = tuple[Callable[[], Outputs], Callable[[], Outputs], Callable[[], Outputs]]


def row_stats(rows: int, vocabulary: int, width: int, args: Args, g: torch.Generator) -> Calls:
    """Loss, and logits overwritten by their gradient, against cross_entropy and its backward."""
    raw = torch.randn(rows, vocabulary, generator=g).to(args.device, args.dtype)
    target = torch.randint(vocabulary, (rows,), generator=g).to(args.device)
    logits = torch.empty_like(raw)

    def ours() -> Outputs:
        logits.copy_(raw)
        stats = compact_ops.row_stats_(logits, target)
        return {"nll": stats.nll, "grad": logits}

    def theirs(values: Tensor = raw) -> Outputs:
        leaf = values.clone().requires_grad_()
        nll = F.cross_entropy(leaf, target, reduction="none")
        return {"nll": nll, "grad": torch.autograd.grad(nll.sum(), leaf)[0]}

    return ours, theirs, lambda: theirs(raw.double())


def filtered(rows: int, vocabulary: int, width: int, args: Args, g: torch.Generator) -> Calls:
    """The product of rounded entries, against a dense product whose draws were made beforehand."""
    grad = torch.randn(rows, vocabulary, generator=g).to(args.device, args.dtype)
    weight = torch.randn(vocabulary, width, generator=g).to(args.device, args.dtype)
    passes = reference.rounded_at_random(grad.double(), THRESHOLD) != 0

    def theirs() -> Outputs:
        rounded = grad.sign() * grad.abs().clamp_min(THRESHOLD)
        return {"out": torch.where(passes, rounded, 0) @ weight}

    return (
        lambda: {"out": compact_ops.filtered_matmul(grad, weight, THRESHOLD)},
        theirs,
        lambda: {"out": reference.filtered_matmul(grad.double(), weight.double(), THRESHOLD)},
    )


def accumulate(rows: int, vocabulary: int, width: int, args: Args, g: torch.Generator) -> Calls:
    """Weighted unit gradients of R tokens onto V rows, against index_add."""
    unit = torch.randn(rows, width, generator=g).to(args.device, args.dtype)
    row = torch.randint(vocabulary, (rows,), generator=g).to(args.device)
    group = torch.randint(4, (rows,), generator=g).to(args.device)
    weight = torch.rand(4, generator=g).to(args.device, args.dtype)

    def call(function: Callable[..., Tensor], *floats: Tensor) -> Outputs:
        return {"out": function(floats[0], row, floats[1], group, vocabulary)}

    def plain(unit: Tensor, rows: Tensor, weight: Tensor, group: Tensor, count: int) -> Tensor:
        out = torch.zeros(count, unit.shape[1], device=unit.device)
        return out.index_add(0, rows, (weight[group][:, None] * unit).float())

    return (
        functools.partial(call, compact_ops.accumulate_weighted, unit, weight),
        functools.partial(call, plain, unit, weight),
        functools.partial(call, reference.accumulate_weighted, unit.double(), weight.double()),
    )


def plain_weights(
    scores: Tensor, offsets: Tensor, beta: Tensor, prior_std: Tensor
) -> ProblemWeights:
    """The weights of all problems at once in plain torch, for scores that are not all equal."""
    counts = offsets.diff()
    problem = torch.arange(len(counts), device=scores.device).repeat_interleave(counts)

    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), len(counts)).index_add_(1, problem, values)
        return (sums / counts)[:, problem]

    centred = scores - mean(scores)
    z = centred / (mean(centred.square()) + prior_std[:, None].square()).sqrt()
    combined = (beta[:, None] * z).sum(0)
    least = combined.new_full((len(counts),), -torch.inf)
    top = least.scatter_reduce(0, problem, combined, "amax")
    exp = (combined - top[problem]).exp()
    sums = torch.zeros_like(top).index_add_(0, problem, exp)
    return ProblemWeights(exp / sums[problem], z)


def weights(rows: int, vocabulary: int, width: int, args: Args, g: torch.Generator) -> Calls:
    """Weights of R rationales, four a problem, against index_add and scatter_reduce."""
    scores = torch.randn(3, rows, generator=g).to(args.device)
    offsets = torch.arange(0, rows + 1, 4, device=args.device)
    beta, prior = torch.ones(3, device=args.device), torch.full((3,), 0.1, device=args.device)
    offsets[-1] = rows

    def call(function: Callable[..., ProblemWeights], *floats: Tensor) -> Outputs:
        return function(floats[0], offsets, *floats[1:])._asdict()

    double = (scores.double(), beta.double(), prior.double())
    return (
        functools.partial(call, compact_ops.problem_weights, scores, beta, prior),
        functools.partial(call, plain_weights, scores, beta, prior),
        functools.partial(call, reference.problem_weights, *double),
    )


def divergence(rows: int, vocabulary: int, width: int, args: Args, g: torch.Generator) -> Calls:
    """KL to a teacher of twice the width and the student's gradient, against whole logits."""
    made = ((rows, width), (vocabulary, width), (rows, 2 * width), (vocabulary, 2 * width))
    hidden, head, teacher_hidden, teacher_head = (
        (torch.randn(size, generator=g) / size[1] ** 0.25).to(args.device, args.dtype)
        for size in made
    )

    def ours() -> Outputs:
        leaf = hidden.detach().requires_grad_()
        kl = compact_ops.head_divergence(leaf, head, teacher_hidden, teacher_head)
        return {"kl": kl, "grad": torch.autograd.grad(kl.sum(), leaf)[0]}

    def theirs(dtype: torch.dtype = args.dtype) -> Outputs:
        leaf = hidden.to(dtype).requires_grad_()
        student = (leaf @ head.to(dtype).T).float().log_softmax(1)
        with torch.no_grad():
            teacher = (teacher_hidden.to(dtype) @ teacher_head.to(dtype).T).float().log_softmax(1)
        kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return {"kl": kl, "grad": torch.autograd.grad(kl.sum(), leaf)[0]}

    return ours, theirs, lambda: theirs(torch.float64)


_CALLS = {
    "row_stats_": row_stats,
    "filtered_matmul": filtered,
    "accumulate_weighted": accumulate,
    "problem_weights": weights,
    "head_divergence": divergence,
}
