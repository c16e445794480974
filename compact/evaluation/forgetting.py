"""Measures what a student forgot: perplexity and KL on retained text, accuracy drop on tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from compact.files import check_shape, json_lines, read_text


def read_texts(path: str | Path) -> list[str]:
    """Reads retained texts: JSON lines {"text": ...}, or plain text with blank lines between them.

    Raises:
        ValueError: a row has no text (names `file:line`), or the file has no text at all.
        OSError: the file cannot be read.
    """
    if Path(path).suffix != ".jsonl":
        texts = [part.strip() for part in read_text(path).split("\n\n") if part.strip()]
    else:
        texts = []
        for where, _, row in json_lines(path):
            check_shape(row, {"text": str}, where)
            texts += [row["text"]] if row["text"].strip() else []
    if not texts:
        raise ValueError(f"{path}: expected at least one text, got none")
    return texts


@torch.inference_mode()
def text_drift(
    student: Any,
    base: Any,
    processing_class: Any,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
) -> dict[str, float]:
    """Measures how far a student has moved from its base on retained texts.

    Args:
        student: the distilled model.
        base: the model that it started from. If `base` is the same object as `student`, a peft
            model, the base is the student with its adapter disabled.
        processing_class: the tokenizer of both.
        texts: the retained texts.
        max_length: most tokens read of each text.

    Returns:
        tokens, base_perplexity, student_perplexity and kl = KL(base || student), nats per token.

    Raises:
        ValueError: no text has two or more tokens.
    """
    device = next(student.parameters()).device
    count, nll, base_nll, kl = 0, 0.0, 0.0, 0.0
    for text in tqdm(texts, unit="text", desc="retained text"):
        ids = torch.tensor([processing_class(text)["input_ids"][:max_length]], device=device)
        if ids.shape[1] < 2:
            continue
        target = ids[0, 1:, None]
        ours = student(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        with student.disable_adapter() if base is student else nullcontext():
            theirs = base(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        nll -= ours.gather(1, target).sum().item()
        base_nll -= theirs.gather(1, target).sum().item()
        kl += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(target)
    if not count:
        raise ValueError("retained text: expected a text of at least two tokens, got none")
    return {
        "tokens": count,
        "base_perplexity": math.exp(base_nll / count),
        "student_perplexity": math.exp(nll / count),
        "kl": kl / count,
    }


def paired_drop(base: Path, student: Path) -> dict[str, float]:
    """Compares two item files on the same questions.

    Returns:
        base_accuracy, student_accuracy, drop = base - student, and its 95% interval drop_low,
        drop_high from the per-question differences (normal approximation).
    """
    rights = []
    for path in (base, student):
        rights.append({item["question_id"]: item["correct"] for _, _, item in json_lines(path)})
    lost = [rights[0][i] - rights[1][i] for i in rights[0]]
    n = len(lost)
    drop = sum(lost) / n
    half = 1.96 * math.sqrt(sum((x - drop) ** 2 for x in lost) / max(1, n - 1) / n)
    return {
        "items": n,
        "base_accuracy": sum(rights[0].values()) / n,
        "student_accuracy": sum(rights[1].values()) / n,
        "drop": drop,
        "drop_low": drop - half,
        "drop_high": drop + half,
    }


def describe_forgetting(found: dict[str, Any]) -> str:
    """Returns the measured forgetting as text, one line per text set or task."""
    lines = [
        f"{path}: accuracy {x['base_accuracy']:.3f} -> {x['student_accuracy']:.3f}, drop "
        f"{x['drop']:+.3f} (95% CI {x['drop_low']:+.3f} to {x['drop_high']:+.3f})"
        for path, x in found["tasks"].items()
    ]
    if "text" in found:
        x = found["text"]
        lines.append(
            f"{x['data']}: perplexity {x['base_perplexity']:.2f} -> {x['student_perplexity']:.2f}, "
            f"KL {x['kl']:.4f} nats per token over {x['tokens']} tokens"
        )
    return "\n".join(lines)
