"""For tests of the operators and of code that calls them: sample inputs, tolerance rule, opcheck.

The tolerance rule: the largest error of the kernel against float64 is at most twice that of torch's
own path in the same dtype, plus a few units in the last place. A failure is an AssertionError that
names the output and its worst entry. `SAMPLES` has an entry for each public operator; `CPU_ONLY`
names the operators without a CUDA kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import compact_ops
from compact_ops import reference
from compact_ops.types import GoldAnswers

Inputs = dict[str, Any]

# A sum of a few hundred terms in another order may differ by this many units in the last place.
_ULPS = 32


class Sample(NamedTuple):
    """How to test one public operator.

    Attributes:
        make: takes a seed and a size of at least 4 (tokens, rows or pairs) and returns the keyword
            arguments of one call, in float64.
        leaves: the differentiable arguments.
        changed: the arguments that the call overwrites.
    """

    make: Callable[[int, int], Inputs]
    leaves: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> Inputs:
    """Returns copies of the arguments, with floating-point tensors in another dtype."""
    return {k: _cast(v, dtype) for k, v in inputs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)


def head_inputs(
    seed: int = 0,
    tokens: int = 37,
    width: int = 19,
    vocabulary: int = 301,
    rows: int | None = None,
) -> Inputs:
    """Returns arguments of `linear_token_stats`.

    Every fifth token is ignored; gold answers have 1 to 3 tokens.

    Args:
        seed: seed of all random numbers.
        tokens: M.
        width: H.
        vocabulary: V.
        rows: N, if tokens read random rows; None if token m reads row m.
    """
    g = torch.Generator().manual_seed(seed)
    problems = 3
    counts = torch.randint(1, 4, (problems,), generator=g)
    target = torch.randint(0, vocabulary, (tokens,), generator=g)
    target[::5] = -100
    hidden = tokens if rows is None else rows
    return {
        "hidden": torch.randn(hidden, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64),
        "target": target,
        "rows": None if rows is None else torch.randint(0, rows, (tokens,), generator=g),
        "gold": GoldAnswers(
            torch.randint(0, vocabulary, (int(counts.sum()),), generator=g),
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            torch.randint(0, problems, (tokens,), generator=g),
        ),
    }


def score_ids(tokens: int, vocabulary: int = 301, columns: int = 5, seed: int = 0) -> Tensor:
    """Returns [tokens, columns] ids below `vocabulary`; about every sixth is absent (-1)."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (tokens, columns), generator=g)
    return torch.where(torch.rand(tokens, columns, generator=g) < 1 / 6, -1, ids)


def head_terms(vocabulary: int = 301) -> Inputs:
    """Returns all optional terms of a head: bias [V], softcap, logit scale."""
    bias = torch.linspace(-1, 1, vocabulary, dtype=torch.float64)
    return {"bias": bias, "softcap": 3.0, "logit_scale": 0.7}


def _accumulate_inputs(seed: int, size: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "unit": torch.randn(size, 11, generator=g, dtype=torch.float64),
        "rows": torch.randint(0, 7, (size,), generator=g),
        "weight": torch.rand(4, generator=g, dtype=torch.float64),
        "group": torch.randint(0, 4, (size,), generator=g),
        "num_rows": 9,
    }


def _filtered_inputs(seed: int, size: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "grad": torch.randn(size, 290, generator=g, dtype=torch.float64),
        "weight": torch.randn(290, 11, generator=g, dtype=torch.float64),
        "eps": 0.5,
    }


def _divergence_inputs(seed: int, size: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (size, 6), "weight": (300, 6), "teacher_hidden": (size, 11)}
    shapes["teacher_weight"] = (300, 11)
    found: Inputs = {
        name: torch.randn(*shape, generator=g, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    teacher = {"teacher_softcap": 2.0, "teacher_logit_scale": 0.5}
    return found | head_terms(300) | teacher | {"kind": "jsd", "mix": 0.3}


def _head_inputs(seed: int, size: int) -> Inputs:
    return head_inputs(seed, tokens=size, rows=20) | head_terms()


def _pairs_inputs(seed: int, size: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(9, 6, generator=g, dtype=torch.float64),
        "weight": torch.randn(300, 6, generator=g, dtype=torch.float64),
        "left": torch.randint(0, 9, (size,), generator=g),
        "right": torch.randint(0, 9, (size,), generator=g),
        **head_terms(300),
    }


def _problem_inputs(seed: int, size: int) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.randn(3, size, generator=g, dtype=torch.float64),
        "offsets": torch.tensor([0, 1, size // 2, size]),
        "beta": torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64),
        "prior_std": torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64),
        "tau": 0.7,
        "floor": 0.2,
    }


def _row_inputs(seed: int, size: int) -> Inputs:
    head = head_inputs(seed, tokens=size)
    return {
        "logits": head["hidden"] @ head["weight"].T,
        "target": head["target"],
        "weight": torch.linspace(0, 2, size, dtype=torch.float64),
        "gold": head["gold"],
        **head_terms(),
    }


def _tree_inputs(seed: int, size: int) -> Inputs:
    """Returns two rows of parts.

    Row 0 has a prompt, two rationales and a token in no part. Row 1 has a part whose prefix comes
    after it.
    """
    g = torch.Generator().manual_seed(seed)
    a, b = size // 4, size // 2
    parts = [(0, 0, a, 0, 0), (0, a, b, 0, a), (0, b, size - 1, 0, a), (1, 0, a, a, b),
             (1, a, b, 0, 0)]  # fmt: skip

    def heads(count: int) -> Tensor:
        return torch.randn(2, size, count, 5, generator=g, dtype=torch.float64)

    return {
        "query": heads(6),
        "key": heads(2),
        "value": heads(2),
        "parts": torch.tensor(parts),
        "scale": 0.7,
    }


SAMPLES: dict[str, Sample] = {
    "accumulate_weighted": Sample(_accumulate_inputs, ("unit", "weight")),
    "filtered_matmul": Sample(_filtered_inputs, ("grad", "weight")),
    "head_divergence": Sample(_divergence_inputs, ("hidden", "weight", "bias")),
    "linear_token_stats": Sample(_head_inputs, ("hidden", "weight", "bias")),
    "pairwise_symmetric_kl": Sample(_pairs_inputs, ("hidden", "weight", "bias")),
    "problem_weights": Sample(_problem_inputs),
    "row_stats_": Sample(_row_inputs, changed=("logits",)),
    "tree_attention": Sample(_tree_inputs, ("query", "key", "value")),
}


# Operators without a CUDA kernel of ours: on CUDA this one calls torch's flash attention.
CPU_ONLY = ("tree_attention",)


def run(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    leaves: tuple[str, ...] = (),
    changed: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Calls `function(**inputs)` and, if there are leaves, the backward of its first output.

    The upstream gradient is not uniform and contains zeros. So a gradient that was summed before it
    was multiplied by the upstream gradient is found.

    Returns:
        The outputs by name ("out" if the function returns one tensor), the overwritten arguments by
        name, and "d_NAME" for each leaf.
    """
    arguments = dict(inputs)
    for name in leaves:
        arguments[name] = arguments[name].detach().clone().requires_grad_()
    for name in changed:
        arguments[name] = arguments[name].detach().clone()
    value = function(**arguments)
    outputs = {"out": value} if isinstance(value, Tensor) else dict(value._asdict())
    found = {k: v for k, v in outputs.items() if v is not None}
    if leaves:
        first = next(iter(found.values()))
        upstream = torch.linspace(-1, 2, first.numel(), dtype=first.dtype, device=first.device)
        upstream[1::7] = 0
        wanted = [arguments[name] for name in leaves]
        grads = torch.autograd.grad(first, wanted, upstream.view_as(first))
        found |= {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}
    found |= {name: arguments[name] for name in changed}
    return {k: v.detach() for k, v in found.items()}


def compare(
    name: str,
    got: Tensor,
    theirs: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    ulps: float = _ULPS,
) -> None:
    """Checks one result with the tolerance rule.

    Args:
        name: name of the result, for the message.
        got: result of the kernel.
        theirs: result of torch's own path in the same dtype.
        truth: result of the float64 path for the same numbers.
        factor: the error may be this many times torch's largest error.
        ulps: number of units in the last place of `got`'s dtype that are allowed in addition,
            relative to 1 plus the largest true entry.

    Raises:
        AssertionError: the shape differs, a NaN or infinity is not in the truth, or the error is
            too large; the message names the worst entry.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}")
    if not truth.numel():
        return
    if not got.is_floating_point():
        _report(name, got, truth, (got != truth).double(), 0.0)
        return
    wide = truth.double()
    scale = 1 + float(wide.abs().nan_to_num(posinf=0.0).max())
    own = float(_error(theirs, wide).max())
    eps = torch.finfo(got.dtype).eps
    _report(name, got, truth, _error(got, wide), factor * own + ulps * eps * scale)


def _error(value: Tensor, truth: Tensor) -> Tensor:
    """Returns the distance of each entry; 0 if both are the same infinity or both NaN."""
    same = (value.double() == truth) | (value.isnan() & truth.isnan())
    return torch.where(same, 0.0, (value.double() - truth).abs().nan_to_num(nan=torch.inf))


def _report(name: str, got: Tensor, truth: Tensor, error: Tensor, allowed: float) -> None:
    worst = int(error.argmax())
    if float(error.flatten()[worst]) <= allowed:
        return
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)]
    raise AssertionError(
        f"{name}: wrong at {index}: got {got.flatten()[worst].item()!r}, "
        f"expected {truth.flatten()[worst].item()!r}, error {float(error.flatten()[worst]):.3g}, "
        f"allowed {allowed:.3g}"
    )


def check(
    op: str,
    inputs: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    leaves: tuple[str, ...] | None = None,
    *,
    factor: float = 2.0,
    ulps: float = _ULPS,
    **options: Any,
) -> dict[str, Tensor]:
    """Checks every output and gradient of a public operator with the tolerance rule.

    Args:
        op: name of the operator.
        inputs: the arguments that the operator and its reference share.
        dtype: dtype to which floating-point inputs are cast; the float64 truth is computed from the
            cast numbers.
        leaves: arguments to differentiate; None for all leaves of the operator's sample that
            `inputs` has.
        factor: see `compare`.
        ulps: see `compare`.
        **options: arguments that only the operator takes, not its reference.

    Returns:
        The results of the operator, named as in `run`.

    Raises:
        AssertionError: see `compare`; or a result does not have the dtype of the reference's.
    """
    sample = SAMPLES[op]
    if leaves is None:
        leaves = tuple(n for n in sample.leaves if inputs.get(n) is not None)
    given = cast(inputs, dtype)
    plain = getattr(reference, op)
    got = run(getattr(compact_ops, op), given | options, leaves, sample.changed)
    theirs = run(plain, given, leaves, sample.changed)
    truth = run(plain, cast(given, torch.float64), leaves, sample.changed)
    for name, value in truth.items():
        found, wanted = got[name].dtype, theirs[name].dtype
        if found != wanted:
            raise AssertionError(f"{op}: {name} must have dtype {wanted}, got {found}")
        compare(f"{op}: {name}", got[name], theirs[name], value, factor=factor, ulps=ulps)
    return got


class _Recorder(TorchDispatchMode):
    """Records every call of an operator of this package, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("compact", "compact_fused"):
            # In a backward, tensors may require a gradient, but autograd records nothing.
            forward = torch._C._current_autograd_node() is None
            copies = tuple(
                a.detach().clone().requires_grad_(a.requires_grad and forward)
                if isinstance(a, Tensor)
                else a
                for a in args
            )
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
"""The tests of torch.library.opcheck."""


def opcheck(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    tests: Sequence[str] = OPCHECKS,
    **run_options: Any,
) -> set[str]:
    """Runs torch.library.opcheck on every native operator that a call and its backward use.

    It checks the schema, fake tensors, the autograd registration and tracing with symbolic shapes.

    Args:
        function: a public operator, or code that calls public operators.
        inputs: its keyword arguments.
        tests: which of `OPCHECKS` to run.
        **run_options: `leaves` and `changed` of `run`.

    Returns:
        The names of the operators checked.

    Raises:
        AssertionError: no native operator was called. If a registration is wrong, torch's own
            error is raised.
    """
    with _Recorder() as recorder:
        run(function, inputs, **run_options)
    if not recorder.calls:
        raise AssertionError(f"{function}: no operator of compact_ops was called")
    for op, arguments in recorder.calls:
        torch.library.opcheck(op, arguments, test_utils=tests)
    return {op.name() for op, _ in recorder.calls}
