"""Measures the bounds that the CUDA kernels must keep on a GPU; fails if one is not kept.

    python tools/gpu_bounds.py [--device cuda] [--small]

row_stats_ in place at V = 151,936 bfloat16: at least 0.85 of the measured copy bandwidth. The whole
frozen head, forward and backward, at M = 8,192, H = 2,048: at most 1.2 x its two matrix products.
--small tests the script itself, on any device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from compact_ops import linear_token_stats, row_stats_

ROUNDS = 20


def medians(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    """Seconds of each call: medians of rounds in which all take turns, after one to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, found in zip(calls, times, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


def row_kernel(device: torch.device, rows: int, vocabulary: int) -> float:
    """The row kernel's share of the copy bandwidth: both read and write the logits once."""
    logits = torch.randn(rows, vocabulary, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(logits)
    target = torch.randint(vocabulary, (rows,), device=device)
    copy, kernel = medians(device, lambda: other.copy_(logits), lambda: row_stats_(other, target))
    size = 2 * logits.numel() * logits.element_size()
    print(f"copy {size / copy / 1e9:.0f} GB/s, row_stats_ {size / kernel / 1e9:.0f} GB/s")
    return copy / kernel


def frozen_head(device: torch.device, tokens: int, width: int, vocabulary: int) -> float:
    """The head's time over that of its two products."""
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) / width**0.5
    target = torch.randint(vocabulary, (tokens,), device=device)

    def head() -> None:
        nll = linear_token_stats(hidden, weight, target).nll
        torch.autograd.grad(nll.sum(), hidden)

    def products() -> torch.Tensor:
        with torch.no_grad():
            return (hidden @ weight.T) @ weight

    whole, two = medians(device, head, products)
    print(f"frozen head {whole * 1e3:.2f} ms, its two products {two * 1e3:.2f} ms")
    return whole / two


def main() -> int:
    """Prints each figure beside its bound; returns how many are missed."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--device", default="cuda", type=torch.device)
    parse.add_argument("--small", action="store_true")
    options = parse.parse_args()
    vocabulary = 1000 if options.small else 151_936
    tokens, width = (64, 32) if options.small else (8192, 2048)
    share = row_kernel(options.device, tokens // 2, vocabulary)
    factor = frozen_head(options.device, tokens, width, vocabulary)
    checks = [
        (f"row kernel: {share:.2f} of the copy bandwidth, bound >= 0.85", share >= 0.85),
        (f"frozen head: {factor:.2f} x its two products, bound <= 1.2", factor <= 1.2),
    ]
    for text, kept in checks:
        print("ok    " if kept else "MISSED", text)
    return sum(not kept for _, kept in checks)


if __name__ == "__main__":
    raise SystemExit(main())
