"""Loads the native libraries once and registers fakes and autograd functions with torch."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact_ops._check import compute_dtype
from compact_ops.types import TokenStats

# For each row, the kernels keep one reference per this many vocabulary entries (csrc/ops/head.h).
STASH_BLOCK = 256

_HERE = Path(__file__).parent
_NOTE = _HERE / "no_native.txt"  # setup.py writes it where it builds no libraries
_SLOW = "plain torch, slow and hungry for memory"
_BUILD = "pip install --no-build-isolation .  (in a checkout: make native)"


def _load() -> tuple[str, str, bool]:
    """Loads libcompact_cpu.so, and libcompact_cuda.so if it was built.

    Returns:
        The backend, what it consists of, and whether it runs on a GPU.

    Raises:
        ImportError: a library is missing or does not load, or COMPACT_OPS_BACKEND is not valid.
    """
    wanted = os.environ.get("COMPACT_OPS_BACKEND")
    if wanted not in (None, "native", "reference"):
        raise ImportError(
            f"compact_ops: COMPACT_OPS_BACKEND must be 'native' or 'reference', got {wanted!r}"
        )
    if wanted == "reference":
        return wanted, f"{_SLOW}: COMPACT_OPS_BACKEND=reference is set", True
    if wanted is None and _NOTE.exists():
        what = f"{_SLOW}: {_NOTE.read_text(encoding='utf-8').strip()}"
        cure = f"; to build the native libraries, install g++ and: {_BUILD}"
        warnings.warn(
            f"compact_ops: {what}{cure if sys.platform == 'linux' else ''}",
            RuntimeWarning,
            stacklevel=2,
        )
        return "reference", what, True
    kinds = []
    for kind, required in (("CPU", True), ("CUDA", False)):
        path = _HERE / f"libcompact_{kind.lower()}.so"
        if not path.exists():
            if required:
                raise ImportError(
                    f"compact_ops: {path} is missing (torch {torch.__version__}); build it with: "
                    f"{_BUILD}"
                )
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"compact_ops: {path} does not load into torch {torch.__version__}: {error}; "
                f"rebuild it with: {_BUILD}"
            ) from error
        kinds.append(kind)
    return "native", f"kernels for {' and '.join(kinds)}", "CUDA" in kinds


_BACKEND, _WHAT, _RUNS_ON_GPU = _load()


def backend() -> str:
    """Returns the implementation in use: "native" (fused kernels) or "reference" (plain torch).

    It is "reference" if COMPACT_OPS_BACKEND=reference is set, or if the package was installed
    without native libraries; importing it then gives a RuntimeWarning.
    """
    return _BACKEND


def about_backend() -> str:
    """Returns the backend and what it consists of, or why it is the reference."""
    return f"{_BACKEND} ({_WHAT})"


def _without_kernels(*_: Any) -> None:
    """Stands in for the CUDA kernels; raises ImportError, which names the ways out."""
    raise ImportError(
        f"compact_ops: {_HERE / 'libcompact_cuda.so'} is missing, so the operators do not run on a "
        "GPU; build it with nvcc 12.0 or later on PATH: COMPACT_CUDA=ON pip install "
        "--no-build-isolation .  (in a checkout: -e .), or set COMPACT_OPS_BACKEND=reference "
        f"({_SLOW}), or use the CPU (use_cpu: true, --device cpu)"
    )


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Registers the fake of operator `name`; does nothing with the reference backend.

    Without the CUDA library, also a CUDA kernel that raises.
    """
    if _BACKEND == "native":
        torch.library.register_fake(name)(fake)
        if not _RUNS_ON_GPU:
            torch.library.impl(name, "cuda")(_without_kernels)


def empty_statistics(like: Tensor, count: int, gold_ids: Tensor | None) -> tuple[Tensor, ...]:
    """Returns empty tensors for the six statistics of `count` tokens, in the order of TokenStats.

    The last two have 0 entries if there are no gold answers.
    """
    dtype = compute_dtype(like)
    gold = 0 if gold_ids is None else count
    kinds = (dtype, dtype, dtype, torch.bool, dtype, dtype)
    sizes = (count, count, count, count, gold, gold)
    return tuple(like.new_empty((n,), dtype=k) for n, k in zip(sizes, kinds, strict=True))


def empty_head_statistics(
    like: Tensor,
    count: int,
    gold_ids: Tensor | None,
    score_ids: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Returns `empty_statistics`, then rank, sum_p2, margin and score_logp.

    Args:
        like: a tensor of the device and dtype of the hidden states.
        count: M.
        gold_ids: the gold answers, or None.
        score_ids: [M, C] or None.
        needs: whether rank, sum_p2 and margin are asked for; what is not has 0 rows.
    """
    dtype = compute_dtype(like)
    rank, sum_p2, margin = (
        like.new_empty((count if need else 0,), dtype=kind)
        for need, kind in zip(needs, (torch.int32, dtype, dtype), strict=True)
    )
    shape = (0, 0) if score_ids is None else (count, score_ids.shape[1])
    scores = like.new_empty(shape, dtype=dtype)
    return *empty_statistics(like, count, gold_ids), rank, sum_p2, margin, scores


def named_statistics(
    out: Sequence[Tensor], gold: bool, scores: bool, needs: tuple[bool, ...]
) -> TokenStats:
    """Returns the ten statistics of a head operator by name; None for those not asked for."""
    gold_logit, gold_logp, rank, sum_p2, margin, score_logp = (
        x if asked else None
        for x, asked in zip(out[4:10], (gold, gold, *needs, scores), strict=True)
    )
    nll, lse, entropy, correct = out[:4]
    return TokenStats(
        nll,
        lse,
        entropy,
        correct,
        gold_logit,
        gold_logp,
        rank=rank,
        sum_p2=sum_p2,
        margin=margin,
        score_logp=score_logp,
    )


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Registers the backward of operator `name`; does nothing with the reference backend."""
    if _BACKEND == "native":
        torch.library.register_autograd(name, backward, setup_context=setup_context)


def register_once_differentiable(name: str) -> None:
    """Makes the gradient of the backward operator `name` raise; torch would return zeros."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError(f"{name}: not differentiable, so there is no second derivative")

    register_autograd(name, refuse, lambda ctx, inputs, output: None)


def refuse_second_derivative(name: str) -> None:
    """Raises in a backward that is to be differentiated again (create_graph=True).

    An operator that keeps gradients from its forward has no derivative for them. Torch would leave
    the second derivative out without a word.

    Raises:
        NotImplementedError: the backward runs with gradients enabled.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: there is no second derivative, got create_graph=True")
