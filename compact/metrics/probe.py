"""Adaptability as rises of the gold answer's likelihood along a rationale.

c_t = (1/m) sum_j log p_t(a_j) (`probe`) or the mean raw logit (1/m) sum_j z_t[a_j] (`probe-raw`),
read in the row after token t; A_k = sum_t mask_t relu(c_t - c_{t-1}) over the tokens before the
answer marker, mask 1 at thinking words, else 0.1. Source: the mutual-information adaptability of
COMPACT (arXiv 2601.13992), restricted to the assistant's reasoning as its figure shows. It is free:
the head computes the rows of the gold logits anyway.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compact.metrics import register
from compact.passes import Pass
from compact.passes.segments import segment_sum
from compact.passes.transfer import put

THINKING_WORDS = (
    *("Therefore", "Thus", "Hence", "So", "Consequently", "Wait", "But", "However", "Although"),
    *("First", "Second", "Finally", "Specifically", "In summary", "Basically", "Let", "Assuming"),
    *("Suppose", "Hmm", "Okay", "Note"),
)
OTHER_WORDS = 0.1
"""Mask at tokens that are not thinking words."""
_MASKED_SUM = "masked sum over tokens; mean over rationales"


@lru_cache(maxsize=8)
def thinking_ids(processing_class: PreTrainedTokenizerBase) -> Tensor:
    """Returns [n] int64 sorted ids of thinking words of one token, bare or after a space."""
    forms = [space + word for word in THINKING_WORDS for space in ("", " ")]
    encoded = [processing_class(form, add_special_tokens=False)["input_ids"] for form in forms]
    return torch.tensor(sorted({ids[0] for ids in encoded if len(ids) == 1}), dtype=torch.int64)


@lru_cache(maxsize=8)
def _words_on(device: torch.device, processing_class: PreTrainedTokenizerBase) -> Tensor:
    """Returns `thinking_ids` on a device, copied once."""
    return thinking_ids(processing_class).to(device)


def thinking_mask(token_ids: Tensor, pass_: Pass) -> Tensor:
    """Returns a float32 mask of the shape of token_ids: 1 at thinking words, else 0.1.

    Raises:
        ValueError: if the student was made without its tokenizer.
    """
    processing_class = pass_.student.processing_class
    if processing_class is None:
        raise ValueError("probe: student must be made with its processing_class, got none")
    words = _words_on(token_ids.device, processing_class)
    return torch.where(torch.isin(token_ids, words), 1.0, OTHER_WORDS)


@register("probe", axis="adaptability", needs_gold=True, aggregation=_MASKED_SUM)
def probe(pass_: Pass) -> Tensor:
    """Adaptability as the masked rises of the gold answer's log-likelihood: [R], in nats."""
    return _jumps(pass_, pass_.stats.gold_logp)


@register("probe-raw", axis="adaptability", needs_gold=True, aggregation=_MASKED_SUM)
def probe_raw(pass_: Pass) -> Tensor:
    """Adaptability as the masked rises of the gold answer's raw logits: [R]."""
    return _jumps(pass_, pass_.stats.gold_logit)


def _jumps(pass_: Pass, level: Tensor | None) -> Tensor:
    """Returns [R] sums of mask x relu(level[m + 1] - level[m]) over tokens m before the marker.

    level[m] is read in the row that predicts token m, that is, after token m - 1.
    """
    if level is None:
        raise ValueError("probe: stats must hold the gold answer's logits, got none")
    batch = pass_.batch
    markers = [r.marker for problem in batch.problems for r in problem.rationales]
    marker = put(markers, level, torch.int64)
    first = batch.token_offsets[:-1]
    place = torch.arange(level.numel(), device=level.device) - first[batch.rationale]
    # The last token has no row after it.
    counted = place < torch.minimum(marker, batch.token_offsets.diff() - 1)[batch.rationale]
    rise = torch.zeros_like(level)
    rise[:-1] = (level[1:] - level[:-1]).clamp(min=0)
    return segment_sum(
        torch.where(counted, rise * thinking_mask(batch.target, pass_), 0.0), batch.token_offsets
    )
