"""Times providers in turn on the same inputs, checks their outputs first, and meters peak memory.

A case is a module of this package, `benchmarks/<case>.py`, with two names::

    SHAPES = ({"M": 1024, "H": 576, "V": 49152}, {"M": 256, "H": 576, "V": 49152})

    def providers(args: Args) -> dict[str, Provider | Skipped]:
        torch.manual_seed(args.seed)
        hidden = torch.randn(args.shape["M"], args.shape["H"], dtype=args.dtype, device=args.device)
        ...

        @functools.cache
        def expected():  # plain torch in float64, called once, before anything is timed
            return {"nll": ..., "hidden_grad": ...}

        def ours():  # one timed call; what it returns is compared with expected()
            stats = compact_ops.linear_token_stats(hidden, weight, target)
            (grad,) = torch.autograd.grad(stats.nll.mean(), hidden)
            return {"nll": stats.nll, "hidden_grad": grad}

        return {
            "compact": Provider(ours, expected),
            "torch": Provider(theirs, expected),
            "liger": Skipped("liger_kernel is not installed"),
        }

The first of `SHAPES` names the keys of the case's shapes and their defaults (ints or strings), and
all of `SHAPES` run when the user names none. The first provider is what `ratio` divides by. Inputs
are made in `providers`, once a shape, and shared; what is costly or private to a provider belongs
in its `setup`. A case that does not heed `args.dtype` says so with `DTYPES = ("float32",)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Args:
    """What a case is asked for.

    Attributes:
        shape: the case's own sizes by name, complete.
        device: where inputs live and calls run.
        dtype: of the inputs.
        seed: for the inputs.
        only: names of the providers that will run; None for all. A case may ignore it, or use it to
            leave out work in `providers` that nobody asked for.
    """

    shape: Mapping[str, int | str]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    only: frozenset[str] | None = None


@dataclass(frozen=True)
class Provider:
    """One way to do the case's work.

    Attributes:
        run: one timed call. Returns named tensors for the check.
        expected: returns the reference: a superset of the names that `run` returns. Providers share
            one function under `functools.cache`.
        rtol: largest error allowed of any entry, as a share of the reference's largest entry.
        setup: called once, untimed, before the first call (build a model, compile).
        reset: called untimed before every call (drop gradients).
        slow: whether it runs only where it is named, so that the default run stays short.
    """

    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    rtol: float = 1e-4
    setup: Callable[[], None] | None = None
    reset: Callable[[], None] | None = None
    slow: bool = False


@dataclass(frozen=True)
class Skipped:
    """A provider that cannot run here.

    Attributes:
        reason: in words, printed.
    """

    reason: str


class WrongResult(AssertionError):
    """A provider's outputs disagree with the reference: it is not timed."""


class ProviderFailed(RuntimeError):
    """A provider raised an exception of its own; the message names it."""


@dataclass(frozen=True)
class Timing:
    """What was measured of one provider.

    Attributes:
        seconds: of every timed call.
        peak_mb: memory in MB (10^6 bytes) at the highest point of a call above what was in use
            before it; NaN where this system cannot tell.
        error: largest error against the reference, as a share of its largest entry.
    """

    seconds: tuple[float, ...]
    peak_mb: float
    error: float

    @property
    def median_s(self) -> float:
        """Median over the timed calls, in seconds."""
        return median(self.seconds)

    def quantile(self, percent: int) -> float:
        """Returns the given percentile of the timed calls, in seconds (linear interpolation)."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        return quantiles(self.seconds, n=100, method="inclusive")[percent - 1]


def check(name: str, got: Outputs, provider: Provider) -> float:
    """Compares a provider's outputs with its reference, in float64.

    Args:
        name: of the provider, for the message.
        got: named tensors that `provider.run` returned.
        provider: gives the reference and the tolerance.

    Returns:
        The largest error of any entry, as a share of the largest entry of the reference.

    Raises:
        WrongResult: for no outputs at all, an unknown name, another shape, or an error above `rtol`
            (NaN included); it names the worst entry.
    """
    want = provider.expected()
    if not got:
        raise WrongResult(f"{name}: run() returned no outputs, so nothing can be checked")
    worst = 0.0
    for key, value in got.items():
        if key not in want:
            raise WrongResult(f"{name}: output {key!r} is not in the reference {sorted(want)}")
        reference = want[key].detach().double().cpu()
        actual = value.detach().double().cpu()
        if actual.shape != reference.shape:
            raise WrongResult(
                f"{name}: output {key!r} must have shape {list(reference.shape)}, "
                f"got {list(actual.shape)}"
            )
        if reference.numel() == 0:
            continue
        scale = max(reference.abs().max().item(), torch.finfo(torch.float32).tiny)
        error = (actual - reference).abs_().div_(scale).nan_to_num_(nan=math.inf)
        at = int(error.argmax())
        if not error.flatten()[at] <= provider.rtol:
            index = [int(i) for i in torch.unravel_index(torch.tensor(at), reference.shape)]
            raise WrongResult(
                f"{name}: output {key!r} is wrong at {index}: expected "
                f"{reference.flatten()[at]:.6g}, got {actual.flatten()[at]:.6g}; error "
                f"{error.flatten()[at]:.2e} of the largest entry, allowed {provider.rtol:.0e}"
            )
        worst = max(worst, error.flatten()[at].item())
    return worst


def _memory_kb() -> dict[str, int]:
    """Returns VmRSS and VmHWM of this process in KiB."""
    found = {}
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(("VmRSS:", "VmHWM:")):
                found[line[:5]] = int(line.split()[1])
    return found


def peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """Runs `call` once and returns how far memory rose above where it stood, in MB (10^6 bytes).

    On a GPU this is the allocator's own count. On the CPU it is the kernel's high-water mark of
    resident memory, reset just before (Linux, /proc/self/clear_refs): it sees every allocation of
    every library, however short, where a sampling thread or torch's profiler would miss some. Free
    memory that malloc had kept is handed back first, so that reusing it counts; scratch that a
    library keeps for ever after its first call (MKL's packing buffers) does not count. Exact to
    about 0.5 MB; NaN where the system has no such counter.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except (OSError, AttributeError):
        call()
        return math.nan
    start = _memory_kb()["VmRSS"]
    call()
    return max(0, _memory_kb()["VmHWM"] - start) * 1024 / 1e6


def _seconds(provider: Provider, device: torch.device) -> tuple[float, Outputs]:
    """Times one call, with the garbage collector out of the way; returns its outputs too."""
    if provider.reset:
        provider.reset()
    gc.collect()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        outputs = provider.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, outputs
    finally:
        gc.enable()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts a provider's name before whatever it raises."""
    try:
        yield
    except (WrongResult, KeyboardInterrupt):
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise ProviderFailed(
            f"{name}: {type(error).__name__}: {text[0] if text else ''}"
        ) from error


def silent(what: str, left: float) -> None:
    """Reports no progress."""


def compare(
    providers: Mapping[str, Provider],
    device: torch.device,
    *,
    seconds: float = 25.0,
    rounds: tuple[int, int] = (3, 15),
    only_check: bool = False,
    report: Callable[[str, float], None] = silent,
) -> dict[str, Timing]:
    """Checks all providers, meters their memory, then times them in turn: A B C A B C ...

    Taking turns spreads a slow spell of the machine over all of them, so that ratios survive it.
    The checked and the metered call are the warm-up.

    Args:
        providers: by name.
        device: where they run.
        seconds: stop after the round in which this much timed work is done.
        rounds: but do at least the first, at most the second number of rounds.
        only_check: check and time nothing; timings are then empty and peaks NaN.
        report: called before every call with what is done next and the seconds that are left,
            about; NaN until every provider has run once.

    Returns:
        A timing a provider, in the order given.

    Raises:
        WrongResult: when any provider's outputs are wrong; nothing has been timed then.
        ProviderFailed: when a provider raises anything else.
    """
    errors: dict[str, float] = {}
    last: dict[str, float] = {}  # seconds of the last call
    for name, provider in providers.items():
        report(f"checking {name}", math.nan)
        with _named(name):
            if provider.setup:
                provider.setup()
            last[name], outputs = _seconds(provider, device)
            errors[name] = check(name, outputs, provider)
            del outputs
    if only_check:
        return {name: Timing((), math.nan, errors[name]) for name in providers}
    peaks = {}
    taken: dict[str, list[float]] = {name: [] for name in providers}

    def left() -> float:
        """Seconds of the calls to come, each taken to last as long as the provider's last one."""
        a_round = max(sum(last.values()), 1e-9)
        calls = min(max(math.ceil(seconds / a_round), rounds[0]), rounds[1]) + 1  # 1: for memory
        made = {name: len(taken[name]) + (name in peaks) for name in providers}
        return sum(max(calls - made[name], 0) * last[name] for name in providers)

    for name, provider in providers.items():
        report(f"memory of {name}", left())
        if provider.reset:
            provider.reset()
        with _named(name):
            start = time.perf_counter()
            peaks[name] = peak_mb(provider.run, device)
            last[name] = min(last[name], time.perf_counter() - start)  # the first may compile
    spent, done = 0.0, 0
    while done < rounds[0] or (done < rounds[1] and spent < seconds):
        done += 1
        for name, provider in providers.items():
            report(f"round {done}, {name}", left())
            with _named(name):
                last[name] = _seconds(provider, device)[0]
            taken[name].append(last[name])
            spent += last[name]
    return {name: Timing(tuple(taken[name]), peaks[name], errors[name]) for name in providers}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in (
        *("compact-distill", "torch", "transformers", "peft", "trl", "rustworkx", "networkx"),
        *("liger_kernel", "cut-cross-entropy", "triton"),
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Returns the short commit, "+" behind it when sources differ; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        if head.returncode:
            return "unknown"
        sources = ["--", "benchmarks/*.py", "compact", "compact_ops", "csrc", "CMakeLists.txt"]
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", *sources]).returncode
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + ("+" if dirty else "")


def machine(device: torch.device) -> str:
    """Returns what ran it, in words: the GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                    break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {torch.get_num_threads()} of {os.cpu_count()} cores"
