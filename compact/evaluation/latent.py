"""Shows where training changed a student: hidden states (linear CKA) and weights of each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from compact.evaluation.forgetting import Text, encode_text, outputs_of_both

POSITIONS = 1024
"""Most token positions whose hidden states are compared, spread evenly over the texts."""
_LAYER = re.compile(r"\.(\d+)\.")


@torch.inference_mode()
def hidden_similarity(
    student: Any, base: Any, processing_class: Any, texts: Sequence[Text]
) -> list[float]:
    """Compares the hidden states of a student and its base on the same tokens.

    CKA(X, Y) = |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (linear CKA, Kornblith et
    al. 2019, arXiv 1905.00414). 1 means that the states are equal up to a rotation and a scale.

    Args:
        student: the distilled model.
        base: the model that it started from; `student` itself for an adapter.
        processing_class: the tokenizer of both.
        texts: texts, or pairs of prompt and completion, of which the completion is compared.

    Returns:
        CKA after the embeddings, then after each decoder layer.

    Raises:
        ValueError: there are fewer than two token positions.
    """
    sequences = (encode_text(text, processing_class) for text in texts)
    measured = sum(len(ids) > start for ids, start in sequences)
    most = math.ceil(POSITIONS / max(measured, 1))
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    shown = tqdm(texts, unit="text", desc="layers")
    given = (student, base, processing_class, shown)
    for ids, start, *outputs in outputs_of_both(*given, output_hidden_states=True):
        count = min(most, ids.shape[1] - start)
        at = torch.linspace(start, ids.shape[1] - 1, count).round().long()
        for kept, output in zip(states, outputs, strict=True):
            kept.append(_at(output.hidden_states, at))
    if sum(x.shape[1] for x in states[0]) < 2:
        raise ValueError("hidden states: expected at least two tokens, got fewer")
    after, before = (torch.cat(part, 1) for part in states)
    return [linear_cka(x, y) for x, y in zip(after, before, strict=True)]


def _at(layers: tuple[Tensor, ...], at: Tensor) -> Tensor:
    """Hidden states of some positions: [layers, positions, H], float32, on the CPU."""
    return torch.stack([x[0, at.to(x.device)].float().cpu() for x in layers])


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Returns linear CKA of states [N, H1] and [N, H2]; if one is constant: 1 if both are, or 0."""
    x, y = (a.double() - a.double().mean(0) for a in (x, y))
    sizes = [float((a.T @ a).norm()) for a in (x, y)]
    if not all(sizes):
        return float(not any(sizes))
    return float((y.T @ x).square().sum() / (sizes[0] * sizes[1]))


@torch.inference_mode()
def weights_moved(student: Any, base: Any) -> list[float]:
    """Returns |W - W0| / |W0| (Frobenius) of each decoder layer, all its weights together.

    Args:
        student: the trained model. Of a peft model with one active adapter, what the adapter adds.
        base: the model that it started from.
    """
    changed: dict[int, float] = {}
    size: dict[int, float] = {}

    def count(name: str, change: Tensor | None, before: Tensor) -> None:
        found = _LAYER.search(name)
        if found:
            layer = int(found[1])
            size[layer] = size.get(layer, 0.0) + float(before.double().square().sum())
            more = 0.0 if change is None else float(change.double().square().sum())
            changed[layer] = changed.get(layer, 0.0) + more

    adapted = any(hasattr(module, "get_delta_weight") for module in student.modules())
    if base is student or adapted:
        deltas = {
            f"{name}.base_layer.weight": module.get_delta_weight(module.active_adapters[0])
            for name, module in student.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        for name, weight in student.named_parameters():
            if "lora_" not in name:
                count(name, deltas.get(name), weight)
    else:
        before = dict(base.named_parameters())
        for name, weight in student.named_parameters():
            if name in before and before[name].shape == weight.shape:
                count(name, weight.cpu() - before[name].cpu(), before[name])
    return [math.sqrt(changed[i] / size[i]) for i in sorted(size)]


def layer_drift(
    student: Any, base: Any, processing_class: Any, texts: dict[str, list[Text]]
) -> dict[str, Any]:
    """Returns `moved` (weights) and for each set of texts `states` (CKA), lists over the layers."""
    return {
        "moved": weights_moved(student, base),
        "states": {
            name: hidden_similarity(student, base, processing_class, these)
            for name, these in texts.items()
        },
    }
