"""`compact doctor MODEL`: how this student will be trained here, and what that needs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from compact.config import RecipeConfig
from compact.forward import FLEX_FROM, run_pass
from compact.layout import LEAF_ROOM, choose_layout
from compact.metrics import AXES, get_metric, metric_names
from compact.packing import build_batch
from compact.passes import EncodedProblem, EncodedRationale
from compact.student import Student, base_name, load_student
from compact_ops import backend
from compact_ops.linear_token_stats import plan_head_grad

EPILOG = """example:
  compact doctor HuggingFaceTB/SmolLM2-135M-Instruct --tokens 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact doctor`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="folder (a run's too), Hugging Face name or .gguf file"
    )
    parser.add_argument("--max_length", type=int, default=2560, metavar="N", help="[2560]")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="M", help="tokens of a micro-batch [1024]"
    )


def describe(student: Student, max_length: int) -> Iterator[str]:
    """Yields the lines about the student as it is: what does not depend on what is trained.

    Args:
        student: the student, whose every weight is on its device.
        max_length: most tokens of prompt + one rationale.
    """
    layout, reason = choose_layout(student, "auto", max_length)
    vocabulary, width = student.weight.shape
    parameters = sum(p.numel() for p in student.model.parameters())
    size = student.weight.element_size()
    tied = student.head.weight is student.body.get_input_embeddings().weight
    yield (
        f"student       {type(student.model).__name__}, {parameters:,} parameters, "
        f"{student.weight.dtype}, {_bytes(parameters * size)}".replace("torch.", "")
    )
    yield f"packing       {layout}: {reason}"
    window = student.attention_window
    if layout == "padded" and window is not None and LEAF_ROOM < window < max_length + LEAF_ROOM:
        yield f"              with --max_length {window - LEAF_ROOM} or less it may be a tree"
    attention = student.config._attn_implementation
    if layout == "tree" and attention == "sdpa":
        attention += f"; on CUDA flex_attention for rows of more than {FLEX_FROM} tokens"
    yield f"attention     {attention}"
    yield (
        f"head          V = {vocabulary}, H = {width}, {'tied' if tied else 'untied'}, softcap "
        f"{student.softcap}, logit scale {student.logit_scale:g}; operators: {backend()}"
    )
    for axis in AXES:
        costs = [f"{name} ({_cost(name)})" for name in metric_names(axis)]
        yield f"{axis:13s} {', '.join(costs)}"
    yield "              a token of an answer leaf costs a third of a trained one: forward only"


def needs(student: Student, tokens: int) -> str:
    """Returns in words what training this student's trainable weights takes.

    Args:
        student: the student, its trainable weights those that require a gradient.
        tokens: of a micro-batch, prompts once and all rationales.
    """
    vocabulary, width = student.weight.shape
    plan = plan_head_grad(
        "auto", tokens, width, vocabulary, train_hidden=True, train_head=student.trains_head
    )
    trained = [p for p in student.model.parameters() if p.requires_grad]
    # Beside a weight its gradient and the two moments of AdamW.
    state = sum(3 * p.numel() * p.element_size() for p in trained)
    kept = (kept_bytes(student, 96) - kept_bytes(student, 32)) * tokens // 64
    eager = student.config._attn_implementation == "eager"
    more = ", and eager attention its scores, with the square of a row" if eager else ""
    return (
        f"{sum(p.numel() for p in trained):,} weights, {_bytes(state)} for their gradients and "
        f"AdamW; {tokens} tokens keep {_bytes(kept)} for the backward{more}\n"
        "              (a process on the CPU grows by up to one and a half times that)\n"
        f"              head: {plan.mode}, {plan.products} matrix products, "
        f"{_bytes(plan.kept_bytes)} of that (the logits would be {_bytes(tokens * vocabulary * 4)})"
    )


def kept_bytes(student: Student, length: int) -> int:
    """Bytes that a forward over one rationale of `length` tokens keeps, measured, weights apart."""
    vocabulary = student.weight.shape[0]
    ids = tuple((7 * i + 3) % vocabulary for i in range(length + 8))
    rationale = EncodedRationale(
        "", "", ids[8:], ((0, length),), ("",), (False,), length, None
    )  # no answer
    problem = EncodedProblem("", "", ids[:8], (rationale,), "", ids[:1], ids[:1], ids[:1])
    batch = build_batch([problem], layout="padded", probes=False, pad_token_id=0)
    own = {t.untyped_storage().data_ptr() for t in student.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in student.model.buffers()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, or an address might be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_pass(student, batch.to(student.weight.device))
    return sum(storage.nbytes() for storage in kept.values())


def _bytes(count: int) -> str:
    """A number of bytes in words: "538 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def _cost(name: str) -> str:
    """What a metric costs beside the pass itself."""
    metric = get_metric(name)
    if metric.needs_probes:
        return "answer leaves"
    return "padded rows" if metric.needs_padded else "free"


def run(args: argparse.Namespace) -> int:
    """Runs `compact doctor`; returns the exit status."""
    for name in ("max_length", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    model, processing_class = load_student(base_name(args.model))
    student = Student.of(model, processing_class)
    for line in describe(student, args.max_length):
        print(line)
    model.train()
    print(f"full training {needs(student, args.tokens)}")
    from peft import get_peft_model

    recipe = RecipeConfig()
    try:
        adapted = get_peft_model(model, recipe.peft_config())
    except ValueError as error:  # none of the layers that a recipe names by default
        print(f"LoRA          not with the default lora_target_modules: {error}")
        return 0
    print(f"LoRA, r = {recipe.lora_r:<4d}{needs(Student.of(adapted), args.tokens)}")
    return 0
