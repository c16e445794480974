"""Sums over segments, and tensors that travel between host and device."""

from __future__ import annotations

import pytest
import torch

from compact.passes.packing import build_batch
from compact.passes.segments import padded, places, segment_max, segment_mean, segment_sum
from compact.passes.transfer import Arriving, put
from helpers.device import DEVICE, on_device, simulated
from helpers.toy import make_problem

OFFSETS = torch.tensor([0, 3, 3, 7, 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8,), (8, 5)])
def test_sums_have_the_bits_of_adding_one_by_one(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape, dtype=dtype)
    found = segment_sum(values, OFFSETS)
    for i, (start, end) in enumerate(zip(OFFSETS[:-1], OFFSETS[1:], strict=True)):
        total = torch.zeros(shape[1:], dtype=dtype)
        for value in values[start:end]:
            total = total + value
        assert torch.equal(found[i], total)
    assert torch.equal(segment_mean(values, OFFSETS)[1], torch.zeros(shape[1:], dtype=dtype))


def test_padded_segments() -> None:
    values = torch.arange(8.0)
    wide = padded(values, places(OFFSETS, 8), (len(OFFSETS) - 1, 4), -1.0)
    assert wide.tolist() == [[0, 1, 2, -1], [-1] * 4, [3, 4, 5, 6], [7, -1, -1, -1]]
    assert torch.equal(wide[places(OFFSETS, 8)], values)
    assert segment_max(values, torch.tensor([0, 3, 8])).tolist() == [2, 7]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_batch_goes_to_the_device_and_back(layout: str) -> None:
    """All tables in one asynchronous copy, each with its shape, dtype and values."""
    batch = build_batch([make_problem(1, [6, 9])], layout=layout, leaves=True, pad_token_id=0)
    assert batch.to("cpu") is batch and batch.on_host is batch
    with simulated() as seen:
        moved = batch.to(DEVICE)
        assert moved.on_host is batch and moved.to(DEVICE) is moved
        tables = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
        tables |= {f"main {k}": v for k, v in vars(moved.main).items() if v is not None}
        assert all(on_device(table) for table in tables.values())
        number = put([1.5, 2.0], moved.target)
        arriving = Arriving({**tables, "number": number})
        assert not seen.places
        found = arriving.get()
        assert [place.split(" ")[0] for place in seen.places] == ["results"]
    assert found["number"].tolist() == [1.5, 2.0]
    wanted = vars(batch) | {f"main {k}": v for k, v in vars(batch.main).items()}
    for name in tables:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name], wanted[name])
