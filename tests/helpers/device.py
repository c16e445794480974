"""A simulated GPU: tensors that say they are on "cuda:0" and record where the host waits for them.

The arithmetic runs on the CPU. PyTorch's dispatcher sees every operator, so an operator that would
block the host on a GPU is counted wherever it is called from: reading a number, an operator whose
result has a shape that depends on the values, a copy in either direction that is not asynchronous.
Operators that mix tensors of host and device raise, as on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from compact.passes.transfer import Arriving

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
# The shape of their result depends on the values.
_WAITS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.is_nonzero),
}
_COPIES = {aten._to_copy, aten.copy_}
_INDEXING = {aten.index, aten.index_put, aten.index_put_}
# Arguments that must be on the CPU, by their position: the indices of pairs.
_OF_HOST = {"pairwise_symmetric_kl": (2, 3), "pairwise_symmetric_kl_backward": (3, 4)}


class DeviceTensor(Tensor):
    """A tensor of the simulated device; `data_` holds its values on the CPU."""

    data_: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> DeviceTensor:
        # To autograd its device is "meta": a build without CUDA has no streams of a CUDA device.
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device="meta",
        )
        made.data_ = data
        return made

    def tolist(self) -> Any:
        """Reads all numbers."""
        _SEEN.wait("tolist")
        return self.data_.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        """Copies numbers of the host."""
        _SEEN.wait("new_tensor")
        kwargs = {"dtype": self.dtype} | kwargs
        return DeviceTensor(torch.tensor(data, **kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Seen:
    """Where the host waited so far."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.flying = False  # whether an asynchronous copy to the host is under way

    def catch_up(self) -> None:
        """Waits for all copies to the host that are under way; for nothing if there are none."""
        if self.flying:
            self.wait("results")
        self.flying = False

    def wait(self, what: str) -> None:
        stack = [f for f in traceback.extract_stack() if "/site-packages/" not in f.filename]
        ours = [f for f in stack if not f.filename.endswith("helpers/device.py")]
        names = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in ours[-3:]]
        self.places.append(f"{what} at {' < '.join(reversed(names))}")


_SEEN = _Seen()


def on_device(value: Any) -> bool:
    """Whether a value is a tensor of the simulated device."""
    return isinstance(value, DeviceTensor)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the CPU and notes whether a GPU would have made the host wait."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    wrappers = {id(x.data_): x for x in given if on_device(x)}
    name = func.overloadpacket
    there = bool(wrappers)
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type != "cpu"
        kwargs["device"] = torch.device("cpu")
    if name in _COPIES:
        source = given[-1]
        target = on_device(given[0]) if name is aten.copy_ else there
        direct = not (kwargs.get("non_blocking") or (name is aten.copy_ and args[2:] == (True,)))
        if on_device(source) != target:
            if direct:
                _SEEN.wait("copy to device" if target else "copy to host")
            elif not target:
                _SEEN.flying = True
    else:
        of_host = [args[i] for i in _OF_HOST.get(name.__name__, ())]
        if any(map(on_device, of_host)):
            raise RuntimeError(f"{name}: expected the indices to be on the CPU")
        others = [x for x in given if not on_device(x) and not any(x is own for own in of_host)]
        mixed = [x for x in others if x.dim()] if wrappers else []
        if name in _INDEXING:
            indices = [i for i in args[1] if i is not None]
            if wrappers and (mixed or any(i.dtype in (torch.bool, torch.uint8) for i in indices)):
                _SEEN.wait(str(name))
        elif mixed:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        elif wrappers and (name in _WAITS or _counts_repeats(func, kwargs)):
            _SEEN.wait(str(name))

    def plain(x: Any) -> Any:
        return x.data_ if on_device(x) else x

    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    if name is aten._to_copy and there and on_device(args[0]) and out.dtype == args[0].dtype:
        return args[0]

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in wrappers:
            return wrappers[id(x)]
        return DeviceTensor(x) if there else x

    return tree_map(wrapped, out)


def _counts_repeats(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it repeats by counts on the device, whose sum the host does not know."""
    counts = func in (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor)
    return counts and kwargs.get("output_size") is None


class _Mode(TorchDispatchMode):
    """Sees the operators that make tensors on the device, besides those of its tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def move(model: nn.Module) -> None:
    """Moves parameters and buffers of a model to the simulated device; tied ones stay tied."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is None or on_device(value):
                    continue
                if id(value) not in moved:
                    there: Any = DeviceTensor(value.detach().clone())
                    if isinstance(value, nn.Parameter):
                        there = nn.Parameter(there, requires_grad=value.requires_grad)
                    moved[id(value)] = there
                own[name] = moved[id(value)]


@contextmanager
def simulated() -> Iterator[_Seen]:
    """Within the context there is a device "cuda:0"; gives the places where the host waited."""
    lifts, init, wait = torch._C._only_lift_cpu_tensors(), torch.cuda._lazy_init, Arriving.wait
    torch._C._set_only_lift_cpu_tensors(True)
    torch.cuda._lazy_init = lambda: None
    Arriving.wait = lambda self: _SEEN.catch_up()  # type: ignore[method-assign]
    _SEEN.places, _SEEN.flying = [], False
    try:
        with _Mode():
            yield _SEEN
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.cuda._lazy_init = init
        Arriving.wait = wait  # type: ignore[method-assign]
