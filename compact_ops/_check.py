"""Checks arguments; all errors read `op: argument must be EXPECTED, got FOUND`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from compact_ops.types import GoldAnswers

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32)

MOST_SCORES = 16
"""Most ids per token whose log-likelihoods a call may ask for (csrc/ops/check.h)."""


def compute_dtype(value: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic and of the result: float64 for float64, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def tensor(
    op: str,
    name: str,
    value: object,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | str],
    **sizes: int,
) -> Tensor:
    """Checks one tensor argument and returns it.

    Args:
        op: operator name, the first word of every error.
        name: argument name.
        value: the argument.
        dtypes: the allowed dtypes.
        shape: one entry per dimension, a number or a letter. A letter that is in `sizes` must have
            that size; any other letter allows any size.
        **sizes: the known sizes by letter.

    Raises:
        TypeError: not a tensor, or the dtype is not allowed.
        ValueError: the shape does not match.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must have dtype {allowed}, got {found}")
    letters = f"[{', '.join(str(s) for s in shape)}]"
    want = [sizes.get(s, s) if isinstance(s, str) else s for s in shape]
    same = value.dim() == len(want) and all(
        isinstance(w, str) or w == n for w, n in zip(want, value.shape, strict=True)
    )
    if not same:
        known = any(not isinstance(w, str) for w in want)
        numbers = f" = [{', '.join(str(w) for w in want)}]" if known else ""
        raise ValueError(
            f"{op}: {name} must have shape {letters}{numbers}, got {list(value.shape)}"
        )
    return value


def together(op: str, **tensors: Tensor | None) -> None:
    """Checks what all tensors of a call share: one device, whole, no forward-mode derivative.

    Raises:
        TypeError: a tensor is spread over processes (DTensor).
        ValueError: a tensor is on another device than the first one.
        NotImplementedError: a tensor has a forward-mode derivative, which torch would take as 0
            without a word.
    """
    given = {name: value for name, value in tensors.items() if value is not None}
    first_name, first = next(iter(given.items()))
    for name, value in given.items():
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{op}: {name} must be whole, got a {type(value).__name__}; give {name}"
                ".full_tensor()"
            )
        if value.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}"
            )
        if not torch.compiler.is_compiling() and unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{op}: {name} must not have a forward-mode derivative (jvp, jacfwd), got one; use "
                f"a backward, or compact_ops.reference.{op}"
            )


def number(
    op: str, name: str, value: float, low: float | None = None, *, inclusive: bool = False
) -> None:
    """Checks that a value is a finite number, and > low (or >= low) if there is a bound.

    Raises:
        TypeError: the value is not a number.
        ValueError: the value is out of range, infinite or NaN.
    """
    # A tracer's numbers have other types, and their values are not known.
    tracing = torch.compiler.is_compiling()
    if not tracing and not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    inside = low is None or (value >= low if inclusive else value > low)
    if not inside or not (tracing or math.isfinite(value)):
        bound = "" if low is None else f"{'>=' if inclusive else '>'} {low:g} and "
        raise ValueError(f"{op}: {name} must be {bound}finite, got {value}")


def integer(op: str, name: str, value: int, low: int | None = None) -> None:
    """Checks that a value is an integer, and >= low if there is a bound.

    Raises:
        TypeError: the value is not an integer.
        ValueError: the value is out of range.
    """
    if not torch.compiler.is_compiling() and not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise ValueError(f"{op}: {name} must be >= {low}, got {value}")


def head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Checks the arguments that describe a head: hidden [N, H], weight [V, H], bias [V].

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was found.
    """
    tensor(op, "hidden", hidden, FLOATS, ["N", "H"])
    tensor(op, "weight", weight, FLOATS, ["V", "H"], H=hidden.shape[1])
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one row (V >= 1), got shape [0, H]")
    terms(op, weight.shape[0], bias, softcap, logit_scale)


def terms(
    op: str,
    vocabulary: int,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    prefix: str = "",
) -> None:
    """Checks what a head does besides its product; `prefix` is that of the arguments' names.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was found.
    """
    if bias is not None:
        tensor(op, f"{prefix}bias", bias, FLOATS, ["V"], V=vocabulary)
    if softcap is not None:
        number(op, f"{prefix}softcap", softcap, 0)
    number(op, f"{prefix}logit_scale", logit_scale)


def gold(op: str, value: GoldAnswers, count: int) -> None:
    """Checks the ragged table of gold answers against M = count tokens.

    Raises:
        TypeError, ValueError: names the field, what was expected and what was found.
    """
    if not isinstance(value, GoldAnswers):
        raise TypeError(f"{op}: gold must be a GoldAnswers, got {type(value).__name__}")
    ids, offsets, problem = value
    tensor(op, "gold.ids", ids, INTS, ["G"])
    tensor(op, "gold.offsets", offsets, INTS, ["P + 1"])
    tensor(op, "gold.problem", problem, INTS, ["M"], M=count)


def statistics(op: str, asked: Collection[str], known: Sequence[str]) -> None:
    """Checks the names of optional statistics.

    Raises:
        TypeError: `asked` is not a collection (an iterator could be read once only), or a text.
        ValueError: a name is unknown.
    """
    if isinstance(asked, str) or not isinstance(asked, Collection):
        raise TypeError(f"{op}: statistics must be a collection of names, got {asked!r}")
    for name in asked:
        if name not in known:
            raise ValueError(f"{op}: statistics must be among {', '.join(known)}, got {name!r}")


def score_ids(op: str, value: Tensor, count: int) -> None:
    """Checks the ids [M, C] of which the log-likelihoods are asked for; C <= 16.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was found.
    """
    columns = tensor(op, "score_ids", value, INTS, ["M", "C"], M=count).shape[1]
    if columns > MOST_SCORES:
        raise ValueError(f"{op}: score_ids must have at most {MOST_SCORES} columns, got {columns}")


def gold_tensors(value: GoldAnswers | None) -> dict[str, Tensor]:
    """Returns the fields of gold answers by their names in error messages."""
    return {} if value is None else {f"gold.{name}": t for name, t in value._asdict().items()}
