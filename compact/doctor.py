"""`compact doctor MODEL`: how this student will be trained here, and what that needs."""

from __future__ import annotations

import argparse

from compact.layout import choose_layout
from compact.metrics import AXES, get_metric, metric_names
from compact.student import Student, load_student
from compact_ops import backend
from compact_ops.linear_token_stats import plan_head_grad

EPILOG = """example:
  compact doctor HuggingFaceTB/SmolLM2-135M-Instruct --tokens 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact doctor`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="folder, Hugging Face name or .gguf file")
    parser.add_argument("--max_length", type=int, default=2560, metavar="N", help="[2560]")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="M", help="completion tokens a pass [1024]"
    )


def describe(student: Student, max_length: int, tokens: int) -> list[str]:
    """Returns the lines that `compact doctor` prints.

    Args:
        student: the student, whose every weight is on its device.
        max_length: most tokens of prompt + one rationale.
        tokens: M, completion tokens of a pass, for the memory of the head.
    """
    layout, reason = choose_layout(student, "auto", max_length)
    vocabulary, width = student.weight.shape
    parameters = sum(p.numel() for p in student.model.parameters())
    size = student.weight.element_size()
    tied = student.head.weight is student.body.get_input_embeddings().weight
    lines = [
        f"student     {type(student.model).__name__}, {parameters / 1e6:.1f}M parameters, "
        f"{student.weight.dtype}".replace("torch.", ""),
        f"packing     {layout}: {reason}",
        f"attention   {student.config._attn_implementation}",
        f"head        V = {vocabulary}, H = {width}, {'tied' if tied else 'untied'}, softcap "
        f"{student.softcap}, logit scale {student.logit_scale:g}; operators: {backend()}",
    ]
    for name, train_head in (("LoRA", False), ("full", True)):
        plan = plan_head_grad(
            "auto", tokens, width, vocabulary, train_hidden=True, train_head=train_head
        )
        lines.append(
            f"{name} training: head mode {plan.mode}, {plan.products} products, "
            f"{plan.kept_bytes / 1e6:.0f} MB kept for {tokens} tokens (their logits would be "
            f"{tokens * vocabulary * 4 / 1e6:.0f} MB)"
        )
    # AdamW keeps two moments beside weight and gradient.
    lines.append(
        f"memory      weights {parameters * size / 1e6:.0f} MB; full training with AdamW "
        f"{parameters * (2 * size + 8) / 1e6:.0f} MB, activations apart"
    )
    for axis in AXES:
        costs = [f"{name} ({_cost(name)})" for name in metric_names(axis)]
        lines.append(f"{axis:13s} {', '.join(costs)}")
    return lines


def _cost(name: str) -> str:
    """What a metric costs beside the pass itself."""
    metric = get_metric(name)
    if metric.needs_probes:
        return "answer leaves, forward only"
    return "padded rows" if metric.needs_padded else "free"


def run(args: argparse.Namespace) -> int:
    """Runs `compact doctor`; returns the exit status."""
    for name in ("max_length", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    model, processing_class = load_student(args.model)
    student = Student.of(model, processing_class)
    print("\n".join(describe(student, args.max_length, args.tokens)))
    return 0
