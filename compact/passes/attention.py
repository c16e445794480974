"""The attention of a tree: who sees whom, and how answer leaves see what stands before them.

The answer leaves are a second block of the same pass. Their queries attend to the keys and values
that the main block left in every layer, so no token is computed twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compact.passes.packing import tree_mask, tree_rule
from compact.passes.types import Batch
from compact.student import Student
from compact.student.internals import attention_implementation, attention_set_to
from compact_ops import tree_attention

# Tokens of a row on CUDA from which FlexAttention is used; below, a dense mask is small.
FLEX_FROM = 1024
_IMPLEMENTATION = "compact_tree"
# What a layer may ask of its attention that tree_attention does not have.
_NOT_PLAIN = ("softcap", "position_bias", "s_aux")


class _TreeAttention:
    """The attention of one pass over a tree: it keeps keys and values of the main block by layer.

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
                    q, k, v = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
                    return tree_attention(q, k, v, self.parts, scaling), None
                attention_mask = self.whole()
        attention = ALL_ATTENTION_FUNCTIONS.get(self.implementation)
        if attention is None:  # "eager" is a function of the model's own file
            attention = sys.modules[type(module).__module__].eager_attention_forward
        output: tuple[Tensor, Tensor | None] = attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output


def _attend(
    module: nn.Module, *args: Any, tree: _TreeAttention | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in each layer; `tree` is the keyword that `run_tree` gave the body.

    Of 37 decoder architectures of transformers 5.17 that could be tried, two do not hand keyword
    arguments down to their attention (stablelm, nemotron): they get padded rows.
    """
    if tree is None:
        raise RuntimeError(
            f"{type(module).__name__} does not receive the keyword arguments of the model"
        )
    return tree.attend(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)

Body = Callable[..., Tensor]


def run_tree(student: Student, batch: Batch, body: Body) -> tuple[Tensor, Tensor | None]:
    """Runs the body over the blocks of a tree.

    A checkpointed layer that runs again in backward finds the model's own attention, which gives
    the same result from the mask that the model was given.

    Args:
        student: the student.
        batch: with layout "tree".
        body: (student, block, mask, **kwargs) -> final hidden states.

    Returns:
        Hidden states of main block [B, L, H] and leaf block [B, L2, H] (None without leaves).
    """
    implementation = _attention_of(student, batch)
    mode: Literal["pass", "keep"] = "pass" if batch.leaves is None else "keep"
    parts = _parts(student, batch) if implementation == "sdpa" else None
    whole = partial(_mask, implementation, student, batch, leaves=False)
    tree = _TreeAttention(implementation, mode, parts, whole)
    with attention_set_to(student.config, _IMPLEMENTATION):
        # Four dimensions also where none is needed, so that the model makes none of its own.
        mask = tree.whole() if parts is None else student.weight.new_zeros(1, 1, 1, 1)
        hidden = body(student, batch.main, mask, tree=tree)
        if batch.leaves is None:
            return hidden, None
        tree.mode = "read"
        with torch.no_grad():
            mask = _mask(implementation, student, batch, leaves=True)
            leaf_hidden = body(student, batch.leaves, mask, tree=tree)
    return hidden, leaf_hidden


def _attention_of(student: Student, batch: Batch) -> str:
    """The attention for a tree: the student's own, or FlexAttention for long rows on CUDA.

    A checkpointed layer runs its second time with the student's own attention, which could not
    take the mask of FlexAttention: such a student has to be loaded with
    attn_implementation="flex_attention".
    """
    own = attention_implementation(student.config)
    long = batch.main.input_ids.is_cuda and batch.main.input_ids.shape[1] > FLEX_FROM
    if own == "sdpa" and long and not student.checkpoints:
        return "flex_attention"
    return own


def _parts(student: Student, batch: Batch) -> Tensor | None:
    """Prompts and rationales as `tree_attention` takes them, None where a mask has to do.

    On a CPU a masked pair costs as much as any other, and most pairs of a tree are masked: tokens
    of different rationales. A checkpointed layer runs its second time with the whole mask.
    """
    if student.checkpoints or batch.main.input_ids.device.type != "cpu":
        return None
    length = batch.main.input_ids.shape[1]
    end = batch.prompt_rows + 1
    begin = end - 1 - batch.main.position_ids.flatten()[batch.prompt_rows]
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
            len(batch.main.input_ids),
            None,
            queries,
            keys,
            device=batch.main.input_ids.device,
        )
    # As numbers: from a bool mask every layer would make its own.
    mask = tree_mask(batch, leaves=leaves)
    dtype = student.weight.dtype
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
