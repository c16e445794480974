"""Moves tensors between host and device without making the host wait.

On a GPU the host runs ahead of the device. A copy of a number, or one from ordinary memory, makes
it wait until the device has done everything before. So tables go to the device in one asynchronous
copy, and results come back in another one, which is waited for only when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def put(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns numbers of the host as a tensor [n] on the device of `like`."""
    return _sent(torch.tensor(values, dtype=dtype), like.device)


def send(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Returns tensors of the host on `device`, sent in one asynchronous copy."""
    buffer, order = _packed(tensors)
    return _unpacked(_sent(buffer, torch.device(device)), tensors, order)


def together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies of tensors of one device that share one storage."""
    buffer, order = _packed(tensors)
    return _unpacked(buffer, tensors, order)


class Arriving:
    """Tensors on their way to the host; the copy starts when this is made."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Starts the copy.

        Args:
            tensors: tensors of one device, by name.
        """
        self._names = tuple(tensors)
        self._shapes = list(tensors.values())
        self._here = all(t.device.type == "cpu" for t in self._shapes)
        self._event: torch.Event | None = None
        if self._here:
            return
        buffer, self._order = _packed(self._shapes)
        self._buffer = buffer.to("cpu", non_blocking=True)  # into pinned memory
        if torch.accelerator.is_available():
            self._event = torch.accelerator.current_stream().record_event()

    def wait(self) -> None:
        """Waits for the copy, and so for everything that the device had to do before it."""
        if self._event is not None:
            self._event.synchronize()

    def get(self) -> dict[str, Tensor]:
        """Returns the tensors by name, on the CPU; waits for them."""
        if not self._here:
            self.wait()
            self._shapes = _unpacked(self._buffer, self._shapes, self._order)
            self._here = True
        return dict(zip(self._names, self._shapes, strict=True))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on `device`; the host does not wait for the copy."""
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Returns the bytes of all tensors in one tensor, and their order in it.

    Those with larger numbers come first, so that every tensor starts at a multiple of its size.
    """
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = [tensors[i].detach().contiguous().flatten().view(torch.uint8) for i in order]
    return torch.cat(parts), order


def _unpacked(buffer: Tensor, like: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
    """Returns views of a buffer with the shapes and dtypes of the tensors that `_packed` got."""
    found: list[Tensor] = list(like)
    start = 0
    for i in order:
        size = like[i].numel() * like[i].element_size()
        found[i] = buffer[start : start + size].view(like[i].dtype).view(like[i].shape)
        start += size
    return found
