"""The LM head: loss and gradient of M tokens from their hidden states, compared with torch.

All providers compute the mean cross-entropy and its gradient with respect to the hidden states
(and, for a trained head, to the weight). COMPACT also computes entropy and top-1 correctness.
compact-rank, -sum_p2, -margin, -scores and -statistics (all of them) ask for more, frozen head.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Args, Outputs, Provider, Skipped
from benchmarks.real import smollm2_rows
from compact_ops import STATISTICS, TokenStats, linear_token_stats

TITLE = "The LM head: loss and gradient from hidden states"
LEGEND = (
    "Mean cross-entropy of M tokens over V words, and its gradient. `products` is only the matrix "
    "products that every exact form needs, into whole [M, V] buffers made beforehand. It is no "
    "lower limit: `compact` multiplies block by block and can be faster "
    "([why](speed.md#why-the-frozen-head-is-faster-than-its-own-matrix-products)). `torch` is "
    "F.linear + cross_entropy; `torch-compile` is the same, compiled; `torch-linear-ce` is torch's "
    "own linear_cross_entropy. (Its chunked form runs only when named: `--provider "
    "torch-linear-ce-chunked`.) `compact` also returns entropy and top-1 correctness. "
    "`compact-filter` rounds entries of the softmax below 2^-12 at random. It is meant for the "
    "states of a real student, not for random ones; docs/results/filter.md shows training with it. "
    "With a trained head, the gradient of the weight is computed too: `compact-fused` is given the "
    "tokens' weights in advance, `compact-stash` keeps the unit gradients in bfloat16, "
    "`compact-recompute` keeps nothing. With `hidden=smollm2` the states are those of a real "
    "student on SVAMP rationales."
)
SHAPES = (
    {"M": 1024, "H": 576, "V": 49152, "head": "frozen", "hidden": "random"},
    {"M": 1024, "H": 576, "V": 49152, "head": "trained", "hidden": "random"},
    {"M": 1024, "H": 576, "V": 49152, "head": "frozen", "hidden": "smollm2"},
)
FILTER = 2.0**-12


def inputs(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden [M, H], weight [V, H] and target [M].

    `hidden=random` draws them so that logits have standard deviation 1. `hidden=smollm2` takes them
    from SmolLM2-135M on SVAMP rationales; H and V are then those of the model.
    """
    m, h, v = (int(args.shape[key]) for key in ("M", "H", "V"))
    if args.shape["hidden"] == "smollm2":
        hidden, weight, target = smollm2_rows(m)
        if list(weight.shape) != [v, h]:
            raise ValueError(f"--shape: hidden=smollm2 needs H,V = {[*weight.shape[::-1]]}")
        return tuple(
            t.to(args.device) for t in (hidden.to(args.dtype), weight.to(args.dtype), target)
        )
    if args.shape["hidden"] != "random":
        raise ValueError(f"--shape: hidden must be random or smollm2, got {args.shape['hidden']!r}")
    generator = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(m, h, generator=generator)
    weight = torch.randn(v, h, generator=generator).mul_(h**-0.5)
    target = torch.randint(v, (m,), generator=generator)
    return (
        hidden.to(args.device, args.dtype),
        weight.to(args.device, args.dtype),
        target.to(args.device),
    )


def reference(hidden: Tensor, weight: Tensor, target: Tensor, trained: bool) -> Outputs:
    """Returns loss, gradients and the results of the products, in float64, by 128 rows."""
    m = len(target)
    weight64 = weight.double()
    nll, grads, mean_weight, logits = [], [], [], []
    weight_grad = torch.zeros_like(weight64) if trained else None
    for some, aims in zip(hidden.double().split(128), target.split(128), strict=True):
        z = some @ weight64.T
        nll.append(F.cross_entropy(z, aims, reduction="none"))
        logits.append(z[:, ::997].clone())
        p = z.softmax(-1)
        mean_weight.append(p @ weight64)
        grads.append((mean_weight[-1] - weight64[aims]) / m)
        if weight_grad is not None:
            p[torch.arange(len(aims), device=p.device), aims] -= 1
            weight_grad.addmm_(p.T, some, alpha=1 / m)
    found = {"loss": torch.cat(nll).mean(), "hidden_grad": torch.cat(grads)}
    found |= {"logits": torch.cat(logits), "mean_weight": torch.cat(mean_weight)}
    return found if weight_grad is None else found | {"weight_grad": weight_grad}


def whole_products(hidden: Tensor, weight: Tensor, trained: bool) -> Callable[[], Outputs]:
    """Returns only the products that every exact form needs, into whole buffers made beforehand.

    It is no lower limit: block by block, with the block still in the cache, they can be faster.
    Logits = hidden W^T, dH = P W and, for a trained head, dW = P^T hidden, with the softmax P
    computed before. dW is not checked: without the target's -1 it is not the gradient.
    """
    probabilities = (hidden @ weight.T).softmax(-1)
    logits = torch.empty_like(probabilities)
    mean_weight = torch.empty_like(hidden)
    weight_grad = torch.empty_like(weight)

    def run() -> Outputs:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(probabilities, weight, out=mean_weight)
        if trained:
            torch.mm(probabilities.T, hidden, out=weight_grad)
        return {"logits": logits[:, ::997], "mean_weight": mean_weight}

    return run


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """COMPACT's modes, the products alone, torch's three forms, and on a GPU the known kernels."""
    if args.shape["head"] not in ("frozen", "trained"):
        raise ValueError(f"--shape: head must be frozen or trained, got {args.shape['head']!r}")
    trained = args.shape["head"] == "trained"
    hidden, weight, target = inputs(args)
    expected = functools.cache(lambda: reference(hidden, weight, target, trained))
    rtol = 1e-4 if args.dtype != torch.bfloat16 else 3e-2
    leaves = (hidden.requires_grad_(), *([weight.requires_grad_()] if trained else []))

    def with_grad(loss_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            loss = loss_of()
            grads = torch.autograd.grad(loss, leaves)
            return {"loss": loss, **dict(zip(("hidden_grad", "weight_grad"), grads, strict=False))}

        return run

    def ours(**options: object) -> Callable[[], Outputs]:
        return with_grad(lambda: linear_token_stats(hidden, weight, target, **options).nll.mean())

    def fused(token_weight: Tensor | Callable[[slice, TokenStats], Tensor]) -> Tensor:
        stats = linear_token_stats(
            hidden, weight, target, head_grad="fused-weights", token_weight=token_weight
        )
        return (stats.weight * stats.nll).sum()

    def naive() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    compiled = torch.compile(naive)
    chunked = torch.nn.LinearCrossEntropyOptions() if hasattr(F, "linear_cross_entropy") else None
    products = whole_products(hidden.detach(), weight.detach(), trained)
    found: dict[str, Provider | Skipped] = {}
    if trained:
        share = torch.full((len(target),), 1 / len(target), device=args.device)
        found["compact-fused"] = Provider(with_grad(lambda: fused(share)), expected, rtol)
        found["compact-fused-callback"] = Provider(
            with_grad(lambda: fused(lambda tokens, _: share[tokens])), expected, rtol
        )
        for mode in ("stash", "recompute"):
            found[f"compact-{mode}"] = Provider(ours(head_grad=mode), expected, max(rtol, 1e-2))
    else:
        found["compact"] = Provider(ours(head_grad="frozen"), expected, rtol)
        found["compact-filter"] = Provider(
            ours(head_grad="frozen", filter_eps=FILTER), expected, 0.05
        )
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(len(weight), (len(target), 16), generator=generator).to(args.device)
        asked: dict[str, dict[str, object]] = {n: {"statistics": (n,)} for n in STATISTICS}
        asked["scores"] = {"score_ids": ids}
        asked["statistics"] = {"statistics": STATISTICS, "score_ids": ids}
        for name, more in asked.items():
            found[f"compact-{name}"] = Provider(
                ours(head_grad="frozen", **more), expected, rtol, slow=True
            )
    found["products"] = Provider(products, expected, rtol)
    found["torch"] = Provider(with_grad(naive), expected, rtol)
    found["torch-compile"] = Provider(with_grad(compiled), expected, rtol)
    if chunked is None:
        found["torch-linear-ce"] = Skipped("torch has no linear_cross_entropy before 2.13")
    else:
        found["torch-linear-ce"] = Provider(
            with_grad(lambda: F.linear_cross_entropy(hidden, weight, target)), expected, rtol
        )
        found["torch-linear-ce-chunked"] = Provider(
            with_grad(lambda: F.linear_cross_entropy(hidden, weight, target, options=chunked)),
            expected,
            rtol,
            slow=True,
        )
    return found | gpu_kernels(args, hidden, weight, target, with_grad, expected, rtol)


def gpu_kernels(
    args: Args,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    with_grad: Callable[[Callable[[], Tensor]], Callable[[], Outputs]],
    expected: Callable[[], Outputs],
    rtol: float,
) -> dict[str, Provider | Skipped]:
    """Liger's fused linear cross-entropy and cut-cross-entropy: both need a GPU."""
    found: dict[str, Provider | Skipped] = {}
    for name, module in (("liger", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")):
        if args.device.type != "cuda":
            found[name] = Skipped("it needs a CUDA device")
        elif importlib.util.find_spec(module) is None:
            found[name] = Skipped(f"{module} is not installed")
    if "liger" not in found:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = Provider(
            with_grad(lambda: liger(weight, hidden, target)), expected, max(rtol, 3e-2)
        )
    if "cut-cross-entropy" not in found:
        from cut_cross_entropy import linear_cross_entropy

        # Half precision only; it filters small gradients by default, hence the tolerance.
        found["cut-cross-entropy"] = (
            Provider(
                with_grad(lambda: linear_cross_entropy(hidden, weight, target)), expected, 5e-2
            )
            if args.dtype == torch.bfloat16
            else Skipped("it takes bfloat16 only (--dtype bfloat16)")
        )
    return found
