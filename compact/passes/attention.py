"""Attention over a tree, for its main block and for its answer leaves.

The answer leaves are a second block of the same pass. Their queries attend to the keys and values
that were stored in every layer for the main block, so no token is computed twice.
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

# On CUDA, rows with more tokens use FlexAttention. For shorter rows a dense mask is small.
FLEX_FROM = 1024
_IMPLEMENTATION = "compact_tree"
# Arguments that a layer may pass to its attention and that tree_attention does not support.
_NOT_PLAIN = ("softcap", "position_bias", "s_aux")


class _TreeAttention:
    """The attention of one pass over a tree. It stores keys and values of the main block by layer.

    Attributes:
        implementation: the name of the attention in transformers.
        kept: attention module -> key and value of the main block, each [B, heads, L, D].
        mode: "keep" while the main block runs if leaves follow, "read" while the leaves run, "pass"
            without leaves.
        parts: parts of the main block for tree_attention; None if the model's mask is used.
        whole: builds the mask over whole rows, for layers that tree_attention does not support.
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
        """Runs the model's own attention; leaves also attend to the keys of the main block."""
        if self.mode == "read":
            kept_key, kept_value = self.kept.pop(module)
            key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        else:
            if self.mode == "keep":
                self.kept[module] = (key.detach(), value.detach())
            if self.parts is not None:
                plain = dropout == 0 and all(kwargs.get(name) is None for name in _NOT_PLAIN)
                if plain and query.shape[-1] == value.shape[-1]:
                    # As SDPA does under autocast: the rotary embedding returns float32.
                    cast = torch.is_autocast_enabled("cpu")
                    dtype = torch.get_autocast_dtype("cpu") if cast else query.dtype
                    q, k, v = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
                    return tree_attention(q, k, v, self.parts, scaling), None
                attention_mask = self.whole()
        attention = ALL_ATTENTION_FUNCTIONS.get(self.implementation)
        if attention is None:  # "eager" is a function in the file of the model
            attention = sys.modules[type(module).__module__].eager_attention_forward
        output: tuple[Tensor, Tensor | None] = attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output


def _attend(
    module: nn.Module, *args: Any, tree: _TreeAttention | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attends in one layer, for transformers; `run_tree` passes `tree` to the body as a keyword.

    Of 37 decoder architectures of transformers 5.23 that could be tested, two do not pass keyword
    arguments on to their attention (stablelm, nemotron). They use padded rows.

    Raises:
        RuntimeError: the model did not pass `tree` on.
    """
    if tree is None:
        raise RuntimeError(
            f"tree must reach the attention: {type(module).__name__} does not receive the keyword "
            "arguments of the model"
        )
    return tree.attend(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)

Body = Callable[..., Tensor]


def run_tree(student: Student, batch: Batch, body: Body) -> tuple[Tensor, Tensor | None]:
    """Runs the body over the main block and the leaf block of a tree.

    With gradient checkpointing, a layer that runs again in the backward uses the model's own
    attention. It gives the same result, because the model was given the mask of the tree.

    Args:
        student: the student.
        batch: a batch with layout "tree".
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
        # tree_attention needs no mask, but without one of 4 dimensions the model builds its own.
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
    """Returns the attention for a tree: the student's own, or FlexAttention for long rows on CUDA.

    A checkpointed layer runs again with the student's own attention, which may not accept the mask
    of FlexAttention. To use FlexAttention there, load the student with
    attn_implementation="flex_attention".
    """
    own = attention_implementation(student.config)
    long = batch.main.input_ids.is_cuda and batch.main.input_ids.shape[1] > FLEX_FROM
    if own == "sdpa" and long and not student.checkpoints:
        return "flex_attention"
    return own


def _parts(student: Student, batch: Batch) -> Tensor | None:
    """Returns prompts and rationales as parts [P + R, 5] for `tree_attention`; None to use a mask.

    On a CPU a masked pair of tokens costs as much as any other, and most pairs of a tree are masked
    (tokens of different rationales). A mask is used on other devices, and with gradient
    checkpointing, where a layer runs again with the model's own attention.
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
    """Returns the mask of the tree in the form that the attention takes."""
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
    # Additive: every layer would convert a bool mask again.
    mask = tree_mask(batch, leaves=leaves)
    dtype = student.weight.dtype
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
