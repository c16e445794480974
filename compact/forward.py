"""Runs one forward of the student over a batch: hidden states, token statistics, answer leaves.

The answer leaves are a second block of the same pass: their queries attend to the keys and values
that the main block left in every layer, so no token is computed twice, and nothing of them is
differentiated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compact.packing import tree_mask
from compact.passes import Batch, Pass
from compact.student import Student
from compact_ops import GoldAnswers, TokenStats, linear_token_stats

_IMPLEMENTATION = "compact_keep_keys"


class _KeptKeys:
    """Keys and values of the main block, layer by layer, and the attention they are used in."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.reading = False

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, with the main block's keys in front while `reading`."""
        if self.reading:
            kept_key, kept_value = self.kept.pop(module)
            key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        else:
            self.kept[module] = (key.detach(), value.detach())
        attention = ALL_ATTENTION_FUNCTIONS.get(self.implementation)
        if attention is None:  # "eager" is a function of the model's own file
            attention = sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, query, key, value, *args, **kwargs)


_active: _KeptKeys | None = None


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    assert _active is not None, "called outside of run_pass"
    return _active.attend(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)


@contextmanager
def _keeping_keys(student: Student) -> Iterator[_KeptKeys]:
    """Puts `_attend` in place of the body's attention.

    It is gone by the time a checkpointed layer runs again in backward: the main block's attention
    is the model's own, so the second run gives the same result without it.
    """
    global _active
    config = student.config
    kept = _KeptKeys(config._attn_implementation)
    before, _active = _active, kept
    config._attn_implementation_internal = _IMPLEMENTATION
    try:
        yield kept
    finally:
        config._attn_implementation_internal = kept.implementation
        _active = before


def run_pass(
    student: Student, batch: Batch, *, head_grad: str = "auto", filter_eps: float = 0.0
) -> tuple[TokenStats, Tensor, Pass]:
    """Runs body and head over a batch.

    Args:
        student: the student; whether anything is differentiated follows from torch.is_grad_enabled
            and its parameters.
        batch: from `build_batch`, on the student's device.
        head_grad: as in `linear_token_stats`.
        filter_eps: as in `linear_token_stats`.

    Returns:
        The token statistics with a differentiable nll, the final hidden states [B, L, H] with
        their graph, and the same, detached, as a Pass.
    """
    if batch.layout == "tree":
        hidden, leaf_hidden = _run_tree(student, batch)
    else:
        hidden, leaf_hidden = _run_padded(student, batch)
    gold = GoldAnswers(batch.gold_ids, batch.gold_offsets, batch.problem[batch.rationale])
    head = {"bias": student.bias, "softcap": student.softcap, "logit_scale": student.logit_scale}
    live = linear_token_stats(
        hidden.flatten(0, 1),
        student.weight,
        batch.target,
        rows=batch.rows,
        gold=gold,
        head_grad=head_grad,
        filter_eps=filter_eps,
        **head,
    )
    leaf_logp = live.nll.new_zeros(batch.leaf_step.shape)
    if leaf_hidden is not None:
        with torch.no_grad():
            probes = linear_token_stats(
                leaf_hidden.flatten(0, 1),
                student.weight,
                batch.probe_target,
                rows=batch.probe_rows,
                **head,
            )
            counts = torch.bincount(batch.probe_leaf, minlength=len(leaf_logp))
            leaf_logp = leaf_logp.index_add(0, batch.probe_leaf, -probes.nll) / counts
    stats = TokenStats(*(x.detach() if isinstance(x, Tensor) else x for x in live))
    return live, hidden, Pass(batch, student, hidden.detach(), leaf_hidden, stats, leaf_logp)


def _body(student: Student, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states [B, L, H]."""
    output = student.body(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    )
    return output.last_hidden_state


def _run_padded(student: Student, batch: Batch) -> tuple[Tensor, Tensor | None]:
    hidden = _body(student, batch.input_ids, batch.position_ids, batch.attention_mask)
    if batch.leaf_input_ids is None:
        return hidden, None
    with torch.no_grad():
        leaf_hidden = _body(
            student, batch.leaf_input_ids, batch.leaf_position_ids, batch.leaf_attention_mask
        )
    return hidden, leaf_hidden


def _run_tree(student: Student, batch: Batch) -> tuple[Tensor, Tensor | None]:
    if batch.leaf_input_ids is None:
        mask = _mask(student, batch, leaves=False)
        return _body(student, batch.input_ids, batch.position_ids, mask), None
    with _keeping_keys(student) as kept:
        main_mask = _mask_for(kept.implementation, student, batch, leaves=False)
        hidden = _body(student, batch.input_ids, batch.position_ids, main_mask)
        kept.reading = True
        with torch.no_grad():
            leaf_mask = _mask_for(kept.implementation, student, batch, leaves=True)
            leaf_hidden = _body(student, batch.leaf_input_ids, batch.leaf_position_ids, leaf_mask)
    return hidden, leaf_hidden


def _mask(student: Student, batch: Batch, *, leaves: bool) -> Tensor:
    return _mask_for(student.config._attn_implementation, student, batch, leaves=leaves)


def _mask_for(implementation: str, student: Student, batch: Batch, *, leaves: bool) -> Tensor:
    """The tree's mask in the form the attention takes: bool, or additive for "eager"."""
    mask = tree_mask(batch, leaves=leaves)
    if implementation == "sdpa":
        return mask
    dtype = student.weight.dtype
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
