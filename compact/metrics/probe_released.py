"""Adaptability exactly as the public training code of COMPACT computes it.

c_t = (1/m) sum_j z_t[a_j] with raw logits at every position of the padded row: prompt, rationale
and padding, with the problem's rationales padded to the longest of them. a_j are the tokens of the
gold answer tokenised alone, not as the text after a cue. A padded query attends to the row's tokens
under SDPA and eager attention, as here; under FlashAttention padded positions are left out, so the
public code itself gives other scores there.
A_k = sum_{t >= 1} mask_t relu(c_t - c_{t-1}), mask_t 1 where token t is a thinking word, else 0.1.
Source: the released training code of COMPACT (arXiv 2601.13992), as restated in the design notes.
Weakness: on pure noise it grows with length; `probe` and `gain` do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.metrics.probe import thinking_mask
from compact.passes import Pass


@register(
    "probe-released",
    axis="adaptability",
    needs_padded=True,
    needs_gold=True,
    aggregation="masked sum over the row; mean over rationales",
)
def probe_released(pass_: Pass) -> Tensor:
    """Returns [R] masked sum of the rises of the raw logits over every position of the row.

    Raises:
        ValueError: if the batch is not padded: padding is part of the formula.
    """
    batch, student = pass_.batch, pass_.student
    if batch.layout != "padded":
        raise ValueError(f"probe-released: batch layout must be padded, got {batch.layout}")
    width = batch.main.input_ids.shape[1]
    row_of = batch.prompt_rows // width
    lengths = batch.main.attention_mask.sum(dim=1)
    mask = thinking_mask(batch.main.input_ids, pass_)
    scores = []
    for index in range(len(batch.problems)):
        mine = row_of[batch.problem_offsets[index] : batch.problem_offsets[index + 1]]
        longest = int(lengths[mine].max())
        gold = torch.tensor(batch.problems[index].raw_gold_ids, device=batch.rows.device)
        if not len(gold):
            scores.append(pass_.hidden.new_zeros(len(mine), dtype=torch.float32))
            continue
        # Only the gold answer's columns of the head: no [L, V] logits.
        logits = pass_.hidden[mine, :longest] @ student.weight[gold].T
        logits = student.logit_scale * logits.float()
        if student.bias is not None:
            logits = logits + student.bias[gold]
        if student.softcap is not None:
            logits = student.softcap * torch.tanh(logits / student.softcap)
        level = logits.mean(dim=2)
        rise = (level[:, 1:] - level[:, :-1]).clamp(min=0)
        scores.append((rise * mask[mine, 1:longest]).sum(dim=1))
    return torch.cat(scores)
