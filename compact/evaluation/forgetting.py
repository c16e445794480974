"""Measures what a student forgot: perplexity and KL on retained text, accuracy drop on tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from compact.data.problems import Text as Prompt
from compact.evaluation.paired import effect, shares
from compact.files import check_shape, json_lines, read_text
from compact.passes.encode import encode_prompt

TEXT, ANSWERS = "text", "answers"
"""What `text_drift` is measured on: retained texts, the student's own answers to the questions."""
Text: TypeAlias = "str | tuple[Prompt, str]"
"""A text, or a prompt and its completion, of which only the completion is measured."""

_MOST_TOKENS = 1024
"""Most tokens of a text that are read."""


def read_texts(path: str | Path) -> list[str]:
    """Reads retained texts: JSON lines {"text": ...}, or plain text with blank lines between them.

    Raises:
        ValueError: a row has no text (names `file:line`), or the file has no text at all.
        OSError: the file cannot be read.
    """
    if Path(path).suffix != ".jsonl":
        parts = re.split(r"\r?\n[ \t]*\r?\n", read_text(path))
        texts = [part.strip() for part in parts if part.strip()]
    else:
        texts = []
        for where, _, row in json_lines(path):
            check_shape(row, {"text": str}, where)
            texts += [row["text"]] if row["text"].strip() else []
    if not texts:
        raise ValueError(f"{path}: expected at least one text, got none")
    return texts


def encode_text(text: Text, processing_class: Any) -> tuple[list[int], int]:
    """Returns the token ids that are read, and the index of the first that is measured."""
    if isinstance(text, str):
        return processing_class(text)["input_ids"][:_MOST_TOKENS], 1
    prompt = encode_prompt(text[0], processing_class)
    answer = processing_class(text[1], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer][:_MOST_TOKENS], len(prompt)


def outputs_of_both(
    student: Any,
    base: Any,
    processing_class: Any,
    texts: Iterable[Text],
    **options: Any,
) -> Iterator[tuple[Tensor, int, Any, Any]]:
    """Runs student and base on each text that has a token to measure.

    Args:
        student: the distilled model.
        base: the model that it started from; `student` itself for an adapter.
        processing_class: the tokenizer of both.
        texts: texts, or pairs of prompt and completion.
        options: for both models.

    Yields:
        Token ids [1, L], the index of the first token that is measured, and the outputs of student
        and base.
    """
    device = next(student.parameters()).device
    for text in texts:
        read, start = encode_text(text, processing_class)
        if len(read) > start:
            ids = torch.tensor([read], device=device)
            ours = student(input_ids=ids, **options)
            with student.disable_adapter() if base is student else nullcontext():
                theirs = base(input_ids=ids, **options)
            yield ids, start, ours, theirs


@torch.inference_mode()
def text_drift(
    student: Any,
    base: Any,
    processing_class: Any,
    texts: Sequence[Text],
) -> dict[str, float]:
    """Measures how far a student has moved from its base on texts, or on completions of prompts.

    Args:
        student: the distilled model.
        base: the model that it started from. If `base` is the same object as `student`, a peft
            model, the base is the student with its adapter disabled.
        processing_class: the tokenizer of both.
        texts: texts, or pairs of prompt and completion, of which the completion counts.

    Returns:
        tokens, base_perplexity, student_perplexity and kl = KL(base || student), nats per token.

    Raises:
        ValueError: no text has a token to measure.
    """
    count, nll, base_nll, kl = 0, 0.0, 0.0, 0.0
    shown = tqdm(texts, unit="text", desc="drift")
    for ids, start, *outputs in outputs_of_both(student, base, processing_class, shown):
        target = ids[0, start:, None]
        ours, theirs = (x.logits[0, start - 1 : -1].float().log_softmax(-1) for x in outputs)
        nll -= ours.gather(1, target).sum().item()
        base_nll -= theirs.gather(1, target).sum().item()
        kl += (theirs.exp() * (theirs - ours)).sum().item()
        count += len(target)
    if not count:
        raise ValueError("retained text: expected a text of at least two tokens, got none")
    return {
        "tokens": count,
        "base_perplexity": _perplexity(base_nll / count),
        "student_perplexity": _perplexity(nll / count),
        "kl": kl / count,
    }


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def paired_drop(base: Path, student: Path) -> dict[str, float]:
    """Compares two item files on the same questions.

    Returns:
        base_accuracy, student_accuracy, drop = base - student, and its 95% interval drop_low,
        drop_high from the per-question differences (`effect`).
    """
    rights = []
    for path in (base, student):
        rights.append({item["question_id"]: item["correct"] for _, _, item in json_lines(path)})
    drop = effect([rights[0][i] - rights[1][i] for i in rights[0]])
    low, high = shares(drop, least=-1.0)
    n = len(rights[0])
    return {
        "items": n,
        "base_accuracy": sum(rights[0].values()) / n,
        "student_accuracy": sum(rights[1].values()) / n,
        "drop": drop.mean,
        "drop_low": low,
        "drop_high": high,
    }


def describe_forgetting(found: dict[str, Any]) -> str:
    """Returns the measured forgetting as text, one line per text set or task."""
    lines = [
        f"{path}: accuracy {x['base_accuracy']:.3f} -> {x['student_accuracy']:.3f}, drop "
        f"{x['drop']:+.3f} (95% CI {x['drop_low']:+.3f} to {x['drop_high']:+.3f})"
        for path, x in found["tasks"].items()
    ]
    lines += [
        f"{x['data']}: perplexity {x['base_perplexity']:.2f} -> {x['student_perplexity']:.2f}, "
        f"KL {x['kl']:.4f} nats per token over {x['tokens']} tokens"
        for x in (found[name] for name in (TEXT, ANSWERS) if name in found)
    ]
    return "\n".join(lines)
