"""Generates texts with a model: greedy or sampled, one batch at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from compact.options import check_number
from compact.student.chat import answer_end
from compact.student.student import evaluating, learned_positions, padding_id

logger = logging.getLogger(__name__)

# Every division copies the cache and begins generate anew, so a few rows do not make one.
_FEW_ROWS = 4
_DIVISIBLE = (DynamicLayer, DynamicSlidingWindowLayer)  # layers that are keys and values, no more


def stop_ids(model: Any, processing_class: Any) -> list[int]:
    """Returns the token ids that end an answer: the model's, the tokenizer's, the template's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(own if isinstance(own, list) else [own])
    ids |= {processing_class.eos_token_id, answer_end(processing_class)}
    return sorted(i for i in ids if i is not None)


def keep_stop_ids(model: Any, processing_class: Any) -> None:
    """Writes `stop_ids` into the model's generation config, for tools that read its folder."""
    config = getattr(model, "generation_config", None)
    ids = stop_ids(model, processing_class)
    if config is not None and ids and config.eos_token_id not in (ids, *ids[: len(ids) == 1]):
        config.eos_token_id = ids


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
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Returns the continuation of each prompt, up to but without the end token.

    Args:
        model: a causal LM of transformers (or a peft model around one). It runs in eval mode; its
            mode is restored.
        processing_class: its tokenizer.
        prompts: token ids of each prompt, of any length; together they are one batch.
        max_new_tokens: most tokens of a continuation.
        temperature: 0 is greedy search; a value above samples from the softmax.
        top_p: samples come from the likeliest tokens only, as few as have this probability.
        seeds: the seed of each sample; needed if temperature is above 0. A text depends on its own
            prompt and seed, not on the rest of the batch. The global random state is not used.
        watch: called after each token with the number of continuations that have ended and the
            number of tokens.

    Raises:
        ValueError: temperature or top_p is out of range, there is not one seed for each prompt, a
            token id has no embedding, or the model's table of learned positions is too short for
            prompt and continuation.
    """
    check_number("temperature", temperature, least=0)
    check_number("top_p", top_p, above=0, most=1)
    if temperature and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(
            f"seeds must be one for each of {len(prompts)} prompts, got "
            f"{seeds if seeds is None else len(seeds)}"
        )
    ends = stop_ids(model, processing_class)
    rows = model.get_input_embeddings().weight.shape[0]
    pad = padding_id(processing_class, rows)
    largest = max(max(prompt, default=0) for prompt in prompts)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives id {largest}, but the model's embedding has {rows} rows; "
            "tokenizer and model must belong together"
        )
    limit, width = learned_positions(model), max(map(len, prompts))
    if limit is not None and width + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens must be at most {limit - width} with a prompt of {width} tokens, as "
            f"the model has learned {limit} positions, got {max_new_tokens}"
        )
    device = next(model.parameters()).device
    choose = LogitsProcessorList()
    if temperature:
        assert seeds is not None
        sampler = _Sampler(seeds, max_new_tokens, temperature, top_p, device)
        choose.append(sampler)
    found: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))  # the continuations that have not ended
    made = 0  # tokens of each of them
    ids, mask = (t.to(device) for t in _left_padded(prompts, pad))
    cache: Cache | None = None  # the keys and values of all tokens but the last of each row
    with _own_forward(model):
        while made < max_new_tokens:
            before = ids.shape[1]
            some = _SomeEnded(before, ends, made, len(prompts) - len(going), watch)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=max_new_tokens - made,
                do_sample=False,  # where one samples, `choose` does
                logits_processor=choose,
                repetition_penalty=1.0,
                eos_token_id=ends,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([some]),
                return_dict_in_generate=True,
            )
            new = output.sequences[:, before:]
            made += new.shape[1]
            still = []
            for place, row in enumerate(new.tolist()):
                end = next((n for n, token in enumerate(row) if token in ends), None)
                found[going[place]] += row[:end]
                if end is None:
                    still.append(place)
            going = [going[place] for place in still]
            if not going:
                break
            rest = torch.tensor(still, dtype=torch.int64, device=device)
            ids = output.sequences[rest]
            mask = torch.cat([mask, mask.new_ones(new.shape)], dim=1)[rest]
            if temperature:
                sampler.keep(rest)
            cache = _divided(output.past_key_values, rest)
    return found


def rooms(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Returns how many tokens the model can write after each prompt, `max_new_tokens` at most.

    Its table of learned positions may end before; the log says so once.
    """
    limit = learned_positions(model)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    found = [max(min(max_new_tokens, limit - len(prompt)), 0) for prompt in prompts]
    if min(found) < max_new_tokens:
        _tell_of_positions(limit, max_new_tokens)
    return found


@cache
def _tell_of_positions(limit: int, max_new_tokens: int) -> None:
    logger.warning(
        "some prompts leave room for fewer than max_new_tokens = %d, as the model has learned %d "
        "positions; their texts end there",
        max_new_tokens,
        limit,
    )


def generate_in_room(
    model: Any,
    processing_class: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Returns what `generate` does, with the tokens that each prompt has room for (see `rooms`).

    A prompt without room gets an empty continuation.
    """
    own = rooms(model, prompts, max_new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    for most in sorted({*own} - {0}):  # one batch if there is room for all
        mine = [i for i, room in enumerate(own) if room == most]
        texts = generate(
            model,
            processing_class,
            [prompts[i] for i in mine],
            most,
            temperature=temperature,
            top_p=top_p,
            seeds=None if seeds is None else [seeds[i] for i in mine],
        )
        for i, ids in zip(mine, texts, strict=True):
            found[i] = ids
    return found


def _divided(cache: Any, rows: Tensor) -> Cache | None:
    """Returns the cache with some rows of its batch only, or None if it may not be divisible.

    Without a cache, generate reads all tokens again.
    """
    if not isinstance(cache, Cache) or any(type(layer) not in _DIVISIBLE for layer in cache.layers):
        return None
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # a LongTensor
    return cache


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    return ids, mask


class _Sampler(LogitsProcessor):
    """Leaves each row one token, drawn from the softmax with random numbers of the row's own."""

    def __init__(
        self,
        seeds: Sequence[int],
        tokens: int,
        temperature: float,
        top_p: float,
        device: torch.device,
    ) -> None:
        self.temperature, self.top_p, self.made = temperature, top_p, 0
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.rand(tokens, generator=g, dtype=torch.float64) for g in own]
        self.drawn = torch.stack(drawn).to(device)  # [rows, tokens], from 0 to 1

    def keep(self, rows: Tensor) -> None:
        """Keeps some rows of the batch only."""
        self.drawn = self.drawn[rows]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # The distribution function, in float64: in float32 rare tokens would be lost in the sum.
        chances = (scores.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, tokens = chances.sort(-1, descending=True)
            likelier = ordered.cumsum(-1) - ordered  # the probability of all likelier tokens
            chances = chances.scatter(-1, tokens, ordered * (likelier < self.top_p))
        up_to = chances.cumsum(-1)
        at = self.drawn[:, self.made, None] * up_to[:, -1:]
        self.made += 1
        token = torch.searchsorted(up_to, at, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _SomeEnded(StoppingCriteria):
    """Stops a batch when a quarter of its rows have ended; the rest goes on as a smaller batch.

    A row that has ended costs as much as any other, and some answers never end by themselves.
    """

    def __init__(
        self,
        width: int,
        ends: Sequence[int],
        made: int,
        ended_before: int,
        watch: Callable[[int, int], None] | None,
    ) -> None:
        self.width, self.ends, self.made = width, torch.tensor(ends), made
        self.ended_before, self.watch = ended_before, watch

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        new = input_ids[:, self.width :]
        ended = torch.isin(new, self.ends.to(new.device)).any(1)
        count = int(ended.sum())
        if self.watch is not None:
            self.watch(self.ended_before + count, self.made + new.shape[1])
        return torch.full_like(ended, count >= max(_FEW_ROWS, len(ended) / 4))


@contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Within the context the model is in eval mode and has its class's forward.

    In training, the trainer and accelerate replace the forward of the model. Its generation_config
    is replaced by an empty one: a file beside the weights must not decide what a greedy answer is.
    """
    replaced = model.__dict__.pop("forward", None)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    configs = [(each, each.generation_config) for each in (model, inner)]
    for each, _ in configs:
        each.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with evaluating(model):
            yield
    finally:
        for each, config in configs:
            each.generation_config = config
        if replaced is not None:
            model.forward = replaced
