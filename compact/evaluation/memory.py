"""Measures the peak memory of a call."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Callable

import torch


def _memory_kb() -> dict[str, int]:
    """Returns VmRSS and VmHWM of this process in KiB."""
    found = {}
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(("VmRSS:", "VmHWM:")):
                found[line[:5]] = int(line.split()[1])
    return found


def release() -> None:
    """Returns free memory that malloc has kept to the system, where it can (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """Runs `call` once and returns its peak memory minus the memory before it, in MB (10^6 bytes).

    On a GPU this is the count of torch's allocator. On the CPU it is the kernel's high-water mark
    of resident memory, reset just before (Linux, /proc/self/clear_refs). It includes every
    allocation of every library, also short ones, which a sampling thread or torch's profiler could
    miss. Free memory that malloc has kept is returned to the system first, so that its reuse
    counts. Buffers that a library keeps after its first call (MKL's packing buffers) do not count.
    Exact to about 0.5 MB; NaN if the system has no such counter.
    """
    release()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        call()
        return math.nan
    start = _memory_kb()["VmRSS"]
    call()
    return max(0, _memory_kb()["VmHWM"] - start) * 1024 / 1e6
