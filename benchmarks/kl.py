"""The consistency term: symmetric KL between K rationales at T positions, with its gradient.

Every pair of rationales is compared at every position. The dense form stores the log-softmax of all
K x T rows; COMPACT processes the vocabulary block by block.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from compact_ops import pairwise_symmetric_kl

TITLE = "The consistency term: symmetric KL of pairs of rationales"
LEGEND = (
    "K rationales compared in pairs at T positions, with the gradient. `torch` is the dense form; "
    "`torch-compile` is the same, compiled."
)
SHAPES = (
    {"K": 4, "T": 64, "H": 576, "V": 49152},
    {"K": 4, "T": 128, "H": 576, "V": 49152},
)


def dense(hidden: Tensor, weight: Tensor, left: Tensor, right: Tensor, count: int) -> Tensor:
    """KL(p||q) + KL(q||p) written as in the formulas: one log-softmax of all rows, then the pairs.

    Args:
        hidden: [N, H] rows, `count` per rationale.
        weight: [V, H].
        left: [P] row of one side, `count` pairs of rows per pair of rationales.
        right: [P] row of the other side.
        count: T.

    Returns:
        [P] divergences.
    """
    logp = F.linear(hidden, weight).log_softmax(-1)
    found = []
    for i, j in zip(left.split(count), right.split(count), strict=True):
        p, q = logp[i], logp[j]
        forth = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        back = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
        found.append(forth + back)
    return torch.cat(found)


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """COMPACT against the dense form, eager and compiled."""
    k, t, h, v = (int(args.shape[key]) for key in ("K", "T", "H", "V"))
    if k < 2 or t < 1:
        raise ValueError(f"--shape: kl needs K >= 2 and T >= 1, got K={k}, T={t}")
    generator = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(k * t, h, generator=generator).to(args.device, args.dtype)
    weight = torch.randn(v, h, generator=generator).mul_(h**-0.5).to(args.device, args.dtype)
    hidden.requires_grad_()
    position = torch.arange(t, device=args.device)
    pairs = list(itertools.combinations(range(k), 2))
    left = torch.cat([i * t + position for i, _ in pairs])
    right = torch.cat([j * t + position for _, j in pairs])

    def with_grad(values_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            values = values_of()
            (grad,) = torch.autograd.grad(values.mean(), hidden)
            return {"kl": values, "hidden_grad": grad}

        return run

    @functools.cache
    def expected() -> Outputs:
        """float64, eight positions at a time."""
        grad = torch.zeros_like(hidden, dtype=torch.float64)
        values = torch.zeros(len(pairs), t, dtype=torch.float64, device=args.device)
        rows = torch.arange(k * t, device=args.device).view(k, t)
        for some in position.split(8):
            chosen = rows[:, some].flatten()
            part = hidden[chosen].detach().double().requires_grad_()
            n = len(some)
            at = torch.arange(n, device=args.device)
            one = torch.cat([i * n + at for i, _ in pairs])
            two = torch.cat([j * n + at for _, j in pairs])
            kl = dense(part, weight.double(), one, two, n)
            (grad[chosen],) = torch.autograd.grad(kl.sum() / len(left), part)
            values[:, some] = kl.detach().view(len(pairs), n)
        return {"kl": values.flatten(), "hidden_grad": grad}

    rtol = 1e-4 if args.dtype != torch.bfloat16 else 3e-2
    naive = functools.partial(dense, hidden, weight, left, right, t)
    ours = functools.partial(pairwise_symmetric_kl, hidden, weight, left.cpu(), right.cpu())
    return {
        "compact": Provider(with_grad(ours), expected, rtol),
        "torch": Provider(with_grad(naive), expected, rtol),
        "torch-compile": Provider(with_grad(torch.compile(naive)), expected, rtol),
    }
