"""Sums and means over segments: tokens of a rationale, rationales of a problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def segment_of(offsets: Tensor, total: int) -> Tensor:
    """Returns the segment index of every element, [total] int64.

    Args:
        offsets: [n + 1].
        total: offsets[-1], which a GPU would have to be waited for.
    """
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sums [n, ...] of values [offsets[-1], ...] per segment; 0 if it is empty.

    Each segment is summed in its order, on every device, so that equal input gives equal bits.
    """
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Returns the means [n, ...] of values [offsets[-1], ...] per segment; 0 if it is empty."""
    sizes = offsets.diff().clamp(min=1).to(values.dtype)
    return segment_sum(values, offsets) / sizes.reshape(-1, *[1] * (values.dim() - 1))


def segment_softmax(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the softmax of values [sum of sizes] over each segment; the sizes are on the host."""
    return torch.cat([part.softmax(0) for part in values.split(sizes)])


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """Returns the maxima [n] of values [offsets[-1]] per segment; none may be empty."""
    return torch.segment_reduce(values, "max", offsets=offsets, axis=0, unsafe=True)


def padded(
    values: Tensor, at: tuple[Tensor, Tensor], shape: tuple[int, int], fill: float
) -> Tensor:
    """Returns [n, width] = `shape`: the values of each segment, then `fill`; `at` from `places`."""
    return values.new_full(shape, fill).index_put_(at, values)


def places(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Returns the segment [total] of every element, and its place [total] in the segment."""
    segment = segment_of(offsets, total)
    return segment, torch.arange(total, device=offsets.device) - offsets[segment]
