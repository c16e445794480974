"""Describes how a student is trained on this machine: layout, attention, head and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compact.metrics import AXES, get_metric, metric_names
from compact.passes import EncodedProblem, EncodedRationale
from compact.passes.attention import FLEX_FROM
from compact.passes.forward import run_pass
from compact.passes.layout import LEAF_ROOM, choose_layout
from compact.passes.packing import build_batch
from compact.student import Student
from compact.student.internals import attention_implementation, has_bf16_products
from compact_ops import backend
from compact_ops.linear_token_stats import plan_head_grad

_ROWS = 4096
"""Rows of the head that the product of `bf16_share` has."""
_TIMES = 7
_WORTH = 0.8
"""bfloat16 is recommended where a product takes at most this share of its time."""


def describe(student: Student, max_length: int) -> Iterator[str]:
    """Yields the lines about the student that do not depend on which weights are trained.

    Args:
        student: the student, with every weight on its device.
        max_length: most tokens of the prompt and one rationale.
    """
    layout, reason = choose_layout(student, "auto", max_length)
    device = student.weight.device
    on_gpu = device.type == "cuda"
    vocabulary, width = student.weight.shape
    parameters = sum(p.numel() for p in student.model.parameters())
    size = student.weight.element_size()
    body: Any = student.body
    tied = student.weight is body.get_input_embeddings().weight
    yield f"device        {torch.cuda.get_device_name(device) if on_gpu else device.type}"
    yield (
        f"student       {type(student.model).__name__}, {parameters:,} parameters, "
        f"{student.weight.dtype}, {_bytes(parameters * size)}".replace("torch.", "")
    )
    yield f"layout        {layout}: {reason}"
    window = student.attention_window
    if layout == "padded" and window is not None and LEAF_ROOM < window < max_length + LEAF_ROOM:
        yield f"              tree is possible with --max_length {window - LEAF_ROOM} or less"
    attention = attention_implementation(student.config)
    if layout == "tree" and attention == "sdpa":
        attention += f"; on CUDA flex_attention for rows of more than {FLEX_FROM} tokens"
    yield f"attention     {attention}"
    yield (
        f"head          V = {vocabulary}, H = {width}, {'tied' if tied else 'untied'}, softcap "
        f"{student.softcap}, logit scale {student.logit_scale:g}; operators: {backend()}"
    )
    yield f"precision     {precision(student)}"
    for axis in AXES:
        costs = [
            f"{name} ({', '.join(get_metric(name).costs) or 'free'})" for name in metric_names(axis)
        ]
        yield f"{axis:13s} {', '.join(costs)}"
    yield "              answer leaves run forward only: a token costs a third of a trained one"


def precision(student: Student) -> str:
    """Returns whether bfloat16 is worth it on this machine, measured on the head if it is a CPU."""
    if student.weight.device.type != "cpu":
        return "bf16: true is recommended on a GPU"
    if not has_bf16_products():
        return "float32; this processor has no instructions for bfloat16"
    share = bf16_share(student.weight.detach()[:_ROWS])
    if share < _WORTH:
        advice = "bf16: true with use_cpu: true is recommended"
        return f"{advice}; a product takes {share:.2f} of its time in float32"
    return f"float32; a product in bfloat16 takes {share:.2f} of its time here"


def bf16_share(weight: Tensor) -> float:
    """Measures how long a product takes in bfloat16, as a share of its time in float32.

    Both times are the least of several runs.

    Args:
        weight: [O, I]; 256 rows are multiplied with it.
    """
    least: dict[torch.dtype, float] = {}
    x = torch.ones(256, weight.shape[1])
    for _ in range(_TIMES):
        for dtype in (torch.float32, torch.bfloat16):  # in turn, so that both see the same load
            a, b = x.to(dtype), weight.to(dtype).T
            start = time.perf_counter()
            a @ b
            least[dtype] = min(least.get(dtype, math.inf), time.perf_counter() - start)
    return least[torch.bfloat16] / least[torch.float32]


def needs(student: Student, tokens: int) -> str:
    """Returns the memory that training this student needs, as text.

    Args:
        student: the student; the weights that require a gradient are trained.
        tokens: tokens of a micro-batch: each prompt once, and all rationales.
    """
    vocabulary, width = student.weight.shape
    plan = plan_head_grad(
        "auto", tokens, width, vocabulary, train_hidden=True, train_head=student.trains_head
    )
    trained = [p for p in student.model.parameters() if p.requires_grad]
    # Per weight: its gradient and the two moments of AdamW.
    state = sum(3 * p.numel() * p.element_size() for p in trained)
    kept = (kept_bytes(student, 96) - kept_bytes(student, 32)) * tokens // 64
    eager = attention_implementation(student.config) == "eager"
    more = "; eager attention also keeps its scores, quadratic in row length" if eager else ""
    if student.weight.device.type == "cpu":
        more += "\n              (the process may grow by up to 1.5 times that)"
    return (
        f"{sum(p.numel() for p in trained):,} weights, {_bytes(state)} for their gradients and "
        f"AdamW; {tokens} tokens keep {_bytes(kept)} for the backward{more}\n"
        f"              head: {plan.mode}, {plan.products} matrix products, "
        f"{_bytes(plan.kept_bytes)} of that (the logits would be {_bytes(tokens * vocabulary * 4)})"
    )


def kept_bytes(student: Student, length: int) -> int:
    """Measures the bytes, without weights, that a forward over `length` tokens keeps."""
    vocabulary = student.weight.shape[0]
    ids = tuple((7 * i + 3) % vocabulary for i in range(length + 8))
    rationale = EncodedRationale(
        "", "", ids[8:], ((0, length),), ("",), (False,), length, None
    )  # no answer
    problem = EncodedProblem("", "", ids[:8], (rationale,), "", ids[:1], ids[:1], ids[:1])
    batch = build_batch([problem], layout="padded", leaves=False, pad_token_id=0)
    own = {t.untyped_storage().data_ptr() for t in student.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in student.model.buffers()}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_pass(student, batch.to(student.weight.device))
    return sum(storage.nbytes() for storage in kept.values())


def _bytes(count: int) -> str:
    """A number of bytes as text: "538 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
