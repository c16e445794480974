"""Sums and means over segments: tokens of a rationale, rationales of a problem."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_of(offsets: Tensor) -> Tensor:
    """Returns the segment index of every element, [offsets[-1]] int64; offsets is [n + 1]."""
    return torch.repeat_interleave(offsets.diff())


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Returns the sums [n, ...] of values [offsets[-1], ...] per segment; 0 if it is empty."""
    out = values.new_zeros(offsets.numel() - 1, *values.shape[1:])
    return out.index_add_(0, segment_of(offsets), values)


def segment_mean(values: Tensor, offsets: Tensor) -> Tensor:
    """Returns the means [n, ...] of values [offsets[-1], ...] per segment; 0 if it is empty."""
    sizes = offsets.diff().clamp(min=1).to(values.dtype)
    return segment_sum(values, offsets) / sizes.reshape(-1, *[1] * (values.dim() - 1))
