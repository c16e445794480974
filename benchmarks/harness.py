"""Checks the outputs of providers, measures their peak memory, and times them in turn.

A case is a module of this package, `benchmarks/<case>.py`, with four names. Its own name belongs in
`CASES` of run.py, and a line about it in the table of README.md::

    TITLE = "The LM head"  # heading and picture title in docs/results/benchmarks.md
    LEGEND = "What the case measures, and what each provider is."  # the paragraph below

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

The first of `SHAPES` defines the keys of the case's shapes and their defaults (ints or strings). If
the user names no shape, all of `SHAPES` run. `ratio` divides by the first provider. `providers`
makes the inputs once per shape, and the providers share them. What is costly or only for one
provider belongs in its `setup`. A case that ignores `args.dtype` sets `DTYPES = ("float32",)`.
"""

from __future__ import annotations

import contextlib
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

from compact.evaluation.memory import peak_mb

ROOT = Path(__file__).resolve().parents[1]
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Args:
    """The arguments of a case.

    Attributes:
        shape: the case's own sizes by name, complete.
        device: device of the inputs and of the calls.
        dtype: dtype of the inputs.
        seed: seed of the inputs.
        only: names of the providers that will run; None for all. A case may ignore it, or use it to
            skip work in `providers` for providers that will not run.
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
        rtol: largest allowed error of any entry, as a share of the reference's largest entry.
        setup: called once, untimed, before the first call (build a model, compile).
        reset: called untimed before every call (drop gradients).
        slow: whether it runs only if it is named, so that the default run stays short.
        seconds: returns the seconds of the last call that count, if not all of it belongs to the
            figure; None counts the whole call.
    """

    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    rtol: float = 1e-4
    setup: Callable[[], None] | None = None
    reset: Callable[[], None] | None = None
    slow: bool = False
    seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Skipped:
    """A provider that cannot run here.

    Attributes:
        reason: the reason in words, for the user.
    """

    reason: str


class WrongResult(AssertionError):
    """A provider's outputs disagree with the reference; it is not timed."""


class ProviderFailed(RuntimeError):
    """A provider raised an exception; the message names the provider."""


@dataclass(frozen=True)
class Timing:
    """The measurements of one provider.

    Attributes:
        seconds: seconds of every timed call.
        peak_mb: peak memory of a call minus the memory in use before it, in MB (10^6 bytes); NaN if
            this system cannot measure it.
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
        name: name of the provider, for the message.
        got: named tensors that `provider.run` returned.
        provider: has the reference and the tolerance.

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


def _seconds(provider: Provider, device: torch.device) -> tuple[float, Outputs]:
    """Times one call without garbage collection; returns its outputs too."""
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
    """Raises a provider's exceptions again as ProviderFailed with its name in the message."""
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
    """Checks all providers, measures their memory, then times them in turn: A B C A B C ...

    If the machine is slow for a while, this affects all providers, so the ratios remain valid. The
    calls for the check and for the memory are the warm-up.

    Args:
        providers: the providers by name.
        device: the device on which they run.
        seconds: stop after the round in which this much timed work is done.
        rounds: least and greatest number of rounds.
        only_check: check the outputs and time nothing; timings are then empty and peaks NaN.
        report: called before every call with a description of it and an estimate of the seconds
            left; NaN until every provider has run once.

    Returns:
        A timing per provider, in the order given.

    Raises:
        WrongResult: if the outputs of a provider are wrong; then nothing has been timed.
        ProviderFailed: if a provider raises any other exception.
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
            taken[name].append(provider.seconds() if provider.seconds else last[name])
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
    """Returns the short commit, with "+" if sources differ from it; "unknown" outside git."""
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
    """Returns the name of the machine: the GPU, or the processor and the number of threads."""
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
