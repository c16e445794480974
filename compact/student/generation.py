"""Generates texts with a model: greedy or sampled, one batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from compact.student.student import learned_positions


def stop_ids(model: Any, processing_class: Any) -> list[int]:
    """Returns the token ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {processing_class.eos_token_id}
    return sorted(i for i in ids if i is not None)


def seed_of(*parts: object) -> int:
    """Returns a seed that depends on the text of the parts only, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@torch.no_grad()
def generate(
    model: Any,
    processing_class: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    watch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Returns the continuation of each prompt, up to but without the end token.

    Args:
        model: a causal LM of transformers (or a peft model around one). It runs in eval mode; its
            mode is restored.
        processing_class: its tokenizer.
        prompts: token ids of each prompt, of any length; they form one left-padded batch.
        max_new_tokens: most tokens of a continuation.
        temperature: 0 is greedy search; any other value samples from the whole softmax.
        seed: seed of the samples. The global random state is not changed.
        watch: called after each token with the number of continuations that have ended and the
            number of tokens.

    Raises:
        ValueError: a token id has no embedding, or the model's table of learned positions is too
            short for prompt and continuation.
    """
    ends = stop_ids(model, processing_class)
    pad = processing_class.pad_token_id
    pad = pad if pad is not None else ends[0]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    rows, largest = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's embedding has {rows} rows; "
            "tokenizer and model must belong together"
        )
    limit = learned_positions(model)
    if limit is not None and width + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must be at most {limit - width} with a prompt of {width} tokens, as "
            f"the model has learned {limit} positions, got {max_new_tokens}"
        )
    device = next(model.parameters()).device
    sampled = temperature > 0
    devices = [device] if device.type == "cuda" else []
    with _own_forward(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # The settings of the model's generation_config are ignored.
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            temperature=temperature if sampled else None,
            top_p=1.0 if sampled else None,
            top_k=0 if sampled else None,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([_Watch(watch, width, ends)] if watch else []),
        )
    texts = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts


class _Watch(StoppingCriteria):
    """Reports how far a batch is, and never stops it."""

    def __init__(self, watch: Callable[[int, int], None], width: int, ends: Sequence[int]) -> None:
        self.watch, self.width, self.ends = watch, width, torch.tensor(ends)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        new = input_ids[:, self.width :]
        ended = torch.isin(new, self.ends.to(new.device)).any(1)
        self.watch(int(ended.sum()), new.shape[1])
        return torch.zeros_like(ended)


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Within the context the model is in eval mode and has its class's forward.

    In training, the trainer and accelerate replace the forward of the model.
    """
    replaced, training = model.__dict__.pop("forward", None), model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if replaced is not None:
            model.forward = replaced
