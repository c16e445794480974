"""Attention of one layer over a question with K rationales, forward and backward.

`compact` computes prompt and rationales as parts of one row in tree layout. `torch-mask` computes
the same row with one mask. `torch-padded` is the padded layout: K causal rows, each with the
prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from compact_ops import TreeTables, tree_attention

TITLE = "Attention of one layer over a question and its rationales"
LEGEND = (
    "A question of Q tokens with K rationales of T tokens each, forward and backward, on the CPU. "
    "`compact` is `tree_attention`; `torch-mask` is torch's SDPA over the same row with one mask; "
    "`torch-padded` is SDPA over K causal rows that each repeat the question."
)
# Q tokens of the question, T of each rationale: SVAMP, GSM8K, long reasoning.
SHAPES = (
    {"K": 4, "Q": 68, "T": 44, "heads": 9, "key_heads": 3, "D": 64},
    {"K": 4, "Q": 120, "T": 160, "heads": 9, "key_heads": 3, "D": 64},
    {"K": 4, "Q": 256, "T": 768, "heads": 9, "key_heads": 3, "D": 64},
)


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """COMPACT's operator, a mask over the row, and padded rows."""
    half = args.dtype in (torch.float16, torch.bfloat16)
    if args.device.type != "cpu" and not half:
        return {"compact": Skipped("on CUDA tree_attention is for float16 and bfloat16")}
    k, question, size, heads, key_heads, depth = (
        int(args.shape[key]) for key in ("K", "Q", "T", "heads", "key_heads", "D")
    )
    generator = torch.Generator().manual_seed(args.seed)
    length = question + k * size
    inputs = [
        torch.randn(1, length, n, depth, generator=generator)
        .to(args.device, args.dtype)
        .requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn(1, length, heads, depth, generator=generator)
    upstream = upstream.to(args.device, args.dtype)
    starts = range(question, length, size)
    near = torch.tensor(
        [(0, 0, question, 0, 0), *((0, at, at + size, 0, question) for at in starts)]
    )
    parts: Tensor | TreeTables = near
    if args.device.type != "cpu":  # as the trainer prepares them, once for all layers
        parts = TreeTables.of(near, 1, length).to(args.device)
    sees = torch.zeros(length, length, dtype=torch.bool)
    for _, begin, end, _, prefix in near.tolist():
        sees[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        sees[begin:end, :prefix] = True
    mask = torch.where(sees, 0.0, -torch.inf).to(args.device, args.dtype)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Moves heads before tokens and repeats key heads, one per query head."""
        groups = heads // key_heads
        key, value = (t.repeat_interleave(groups, dim=2) for t in (key, value))
        return [t.transpose(1, 2) for t in (query, key, value)]

    def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = mask) -> Tensor:
        found = F.scaled_dot_product_attention(*repeated(query, key, value), attn_mask=mask)
        return found.transpose(1, 2)

    def padded(*tensors: Tensor) -> Tensor:
        rows = [
            torch.stack([torch.cat([t[0, :question], t[0, at : at + size]]) for at in starts])
            for t in tensors
        ]
        found = F.scaled_dot_product_attention(*repeated(*rows), is_causal=True).transpose(1, 2)
        # The prompt of the first row stands for all of them, so that no gradient counts twice.
        return torch.cat([found[0, :question], *found[:, question:]])[None]

    def provider(attention: Callable[..., Tensor]) -> Provider:
        def run() -> Outputs:
            out = attention(*inputs)
            grads = torch.autograd.grad(out, inputs, upstream)
            return {"out": out, **dict(zip(("query", "key", "value"), grads, strict=True))}

        return Provider(run, expected, 5e-2 if half else 1e-4)

    @functools.cache
    def expected() -> Outputs:
        wide = [t.detach().double().requires_grad_() for t in inputs]
        out = masked(*wide, mask=mask.double())
        grads = torch.autograd.grad(out, wide, upstream.double())
        return {"out": out, **dict(zip(("query", "key", "value"), grads, strict=True))}

    ours = functools.partial(tree_attention, parts=parts)
    return {
        "compact": provider(ours),
        "torch-mask": provider(masked),
        "torch-padded": provider(padded),
    }
