"""Runs one forward of the student over a batch: hidden states, token statistics, answer leaves.

The answer leaves are a second block of the same pass: their queries attend to the keys and values
that the main block left in every layer, so no token is computed twice, and nothing of them is
differentiated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compact.lean import lean
from compact.packing import tree_mask, tree_rule
from compact.passes import Batch, Pass
from compact.student import Student
from compact_ops import GoldAnswers, TokenStats, linear_token_stats, tree_attention

# Tokens of a row on CUDA from which FlexAttention is used; below, a dense mask is small.
FLEX_FROM = 1024
_IMPLEMENTATION = "compact_keep_keys"
# What a layer may ask of its attention that tree_attention does not have.
_NOT_PLAIN = ("softcap", "position_bias", "s_aux")


class _KeptKeys:
    """Keys and values of the main block, layer by layer, and the attention they are used in.

    Attributes:
        implementation: transformers' name of the attention.
        kept: by attention module, key and value [B, heads, L, D].
        mode: "keep" while the main block runs and leaves will follow, "read" while they run, "pass"
            without leaves.
        parts: of the main block, for tree_attention; None where the mask given to the model rules.
        whole: makes the mask over whole rows, for layers that tree_attention does not cover.
    """

    def __init__(
        self,
        implementation: str,
        mode: Literal["pass", "keep"],
        parts: Tensor | None,
        whole: Callable[[], Tensor | BlockMask],
    ) -> None:
        self.implementation = implementation
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.mode: Literal["pass", "keep", "read"] = mode
        self.parts = parts
        self.whole = cache(whole)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | BlockMask | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, with the main block's keys in front while leaves run."""
        if self.mode == "read":
            kept_key, kept_value = self.kept.pop(module)
            key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        else:
            if self.mode == "keep":
                self.kept[module] = (key.detach(), value.detach())
            if self.parts is not None:
                plain = dropout == 0 and all(kwargs.get(name) is None for name in _NOT_PLAIN)
                if plain and query.shape[-1] == value.shape[-1]:
                    # As SDPA does under autocast, where rotary embedding has left float32.
                    cast = torch.is_autocast_enabled("cpu")
                    dtype = torch.get_autocast_dtype("cpu") if cast else query.dtype
                    by_token = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
                    return tree_attention(*by_token, self.parts, scaling), None
                attention_mask = self.whole()
        attention = ALL_ATTENTION_FUNCTIONS.get(self.implementation)
        if attention is None:  # "eager" is a function of the model's own file
            attention = sys.modules[type(module).__module__].eager_attention_forward
        return attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )


_active: _KeptKeys | None = None


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    assert _active is not None, "called outside of run_pass"
    return _active.attend(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)


@contextmanager
def _attending(student: Student, kept: _KeptKeys) -> Iterator[None]:
    """Puts `_attend` in place of the body's attention.

    It is gone by the time a checkpointed layer runs again in backward: the main block's attention
    is the model's own, so the second run gives the same result without it.
    """
    global _active
    config = student.config
    own = config._attn_implementation
    before, _active = _active, kept
    config._attn_implementation_internal = _IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = own
        _active = before


def run_pass(
    student: Student,
    batch: Batch,
    *,
    head_grad: str = "auto",
    filter_eps: float = 0.0,
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

    Raises:
        ValueError: a tree that reaches further than the student's attention.
    """
    if batch.layout == "tree":
        _check_reach(student, batch)
    with lean(student.body):
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


def _check_reach(student: Student, batch: Batch) -> None:
    """A tree's mask takes the place of a sliding window or chunk, so no row may reach beyond it."""
    window = student.attention_window
    if window is None:
        return
    blocks = [(batch.position_ids, batch.attention_mask)]
    if batch.leaf_position_ids is not None and batch.leaf_attention_mask is not None:
        blocks.append((batch.leaf_position_ids, batch.leaf_attention_mask))
    reach = max(int((positions * mask).max()) + 1 for positions, mask in blocks)
    if reach > window:
        raise ValueError(
            f"batch has a tree that reaches over {reach} tokens, but this student's attention "
            f"reaches over {window}; build it with layout='padded'"
        )


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
    attention = _attention_of(student, batch)
    mode: Literal["pass", "keep"] = "pass" if batch.leaf_input_ids is None else "keep"
    parts = _parts(student, batch) if attention == "sdpa" else None
    whole = partial(_mask, attention, student, batch, leaves=False)
    kept = _KeptKeys(attention, mode, parts, whole)
    with _attending(student, kept):
        # Four dimensions also where none is needed, so that the model makes none of its own.
        mask = kept.whole() if parts is None else student.weight.new_zeros(1, 1, 1, 1)
        hidden = _body(student, batch.input_ids, batch.position_ids, mask)
        if batch.leaf_input_ids is None:
            return hidden, None
        kept.mode = "read"
        with torch.no_grad():
            mask = _mask(attention, student, batch, leaves=True)
            leaf_hidden = _body(student, batch.leaf_input_ids, batch.leaf_position_ids, mask)
    return hidden, leaf_hidden


def _attention_of(student: Student, batch: Batch) -> str:
    """The attention for a tree: the student's own, or FlexAttention for long rows on CUDA.

    A checkpointed layer runs its second time with the student's own attention, which could not
    take the mask of FlexAttention: such a student has to be loaded with
    attn_implementation="flex_attention".
    """
    own: str = student.config._attn_implementation
    long = batch.input_ids.is_cuda and batch.input_ids.shape[1] > FLEX_FROM
    if own == "sdpa" and long and not student.checkpoints:
        return "flex_attention"
    return own


def _parts(student: Student, batch: Batch) -> Tensor | None:
    """Prompts and rationales as `tree_attention` takes them, None where a mask has to do.

    On a CPU a masked pair costs as much as any other, and most pairs of a tree are masked: tokens
    of different rationales. A checkpointed layer runs its second time with the whole mask.
    """
    if student.checkpoints or batch.input_ids.device.type != "cpu":
        return None
    length = batch.input_ids.shape[1]
    end = batch.prompt_rows + 1
    begin = end - 1 - batch.position_ids.flatten()[batch.prompt_rows]
    first = batch.token_rows[batch.token_offsets[:-1]]
    row = first // length
    prompts = begin // length, begin % length, begin % length + (end - begin)
    prefix = torch.stack(prompts[1:])
    rationales = row, first % length, first % length + batch.token_offsets.diff()
    return torch.cat(
        [
            torch.stack([*prompts, *torch.zeros_like(prefix)], dim=1),
            torch.stack([*rationales, *prefix[:, batch.problem]], dim=1),
        ]
    )


def _mask(attention: str, student: Student, batch: Batch, *, leaves: bool) -> Tensor | BlockMask:
    """The tree's mask in the form that the attention takes."""
    if attention == "flex_attention":
        rule, queries, keys = tree_rule(batch, leaves=leaves)
        return create_block_mask(
            lambda b, h, q, k: rule(b, q, k),
            len(batch.input_ids),
            None,
            queries,
            keys,
            device=batch.input_ids.device,
        )
    # As numbers: from a bool mask every layer would make its own.
    mask = tree_mask(batch, leaves=leaves)
    dtype = student.weight.dtype
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
