"""Attention over a tree, for its main block and for its answer leaves.

The answer leaves are a second block of the same pass. Their queries attend to the keys and values
that were stored in every layer for the main block, so no token is computed twice.

With tree_attention, memory is linear in the tokens of a row: it needs no mask, and the leaves of
long rows run in blocks of queries, each with a mask over the keys that it sees. It runs on a CPU,
and on CUDA in float16 and bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compact.passes.transfer import send
from compact.passes.types import Batch
from compact.student import Student, autocast_dtype
from compact.student.internals import (
    attention_implementation,
    attention_set_to,
    checkpointed_within,
)
from compact_ops import TreeTables, tree_attention
from compact_ops.flash_tree import flash_supports

# On CUDA in float32, rows with more tokens use FlexAttention. For shorter rows one mask is small.
FLEX_FROM = 1024
# Leaves with more pairs of query and key (with B rows, B * L2 * (L + L2)) run in blocks of queries.
# Below, one mask of 64 MB at most is faster (on a CPU).
LEAF_PAIRS = 1 << 24
LEAF_QUERIES = 512
# The masks of the blocks are made once for all layers if they have fewer pairs: 64 MB.
KEPT_PAIRS = 1 << 26
_IMPLEMENTATION = "compact_tree"
# Arguments that a layer may pass to its attention and that tree_attention does not support.
_NOT_PLAIN = ("softcap", "position_bias", "s_aux")
Kept = dict[nn.Module, tuple[Tensor, Tensor]]
Attended = tuple[Tensor, Tensor | None]
Rule = Callable[[Tensor | int, Tensor, Tensor], Tensor]  # see `tree_rule`


@dataclass
class _MainAttention:
    """The attention of one pass over the main block of a tree.

    Attributes:
        implementation: the name of the attention in transformers.
        kept: if leaves follow, attention module -> key and value, each [B, heads, L, D]; else None.
            Also None once the block has run: a checkpointed layer that runs again keeps nothing.
        parts: what tree_attention takes; None if the model's mask is used.
        whole: builds the mask over whole rows, for layers that tree_attention does not support.
    """

    implementation: str
    kept: Kept | None
    parts: Tensor | TreeTables | None
    whole: Callable[[], Tensor | BlockMask]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | BlockMask | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Attended:
        """Runs tree_attention where the layer allows it, else the model's own attention."""
        if self.kept is not None:
            self.kept[module] = (key.detach(), value.detach())
        if self.parts is not None:
            plain = dropout == 0 and all(kwargs.get(name) is None for name in _NOT_PLAIN)
            if plain and query.shape[-1] == value.shape[-1]:
                # As SDPA does under autocast: the rotary embedding returns float32.
                dtype = autocast_dtype(query.device.type) or query.dtype
                q, k, v = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
                if q.device.type == "cpu" or flash_supports(q.device, q.dtype, q.shape[-1]):
                    return tree_attention(q, k, v, self.parts, scaling), None
            attention_mask = self.whole()
        own = _own_attention(self.implementation, module)
        return own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )


class _LeafBlock(NamedTuple):
    """Some queries of a row of the leaf block.

    Attributes:
        row: the row.
        queries: the queries.
        keys: the indices of all keys that they see.
        mask: returns [queries, keys], which sees which.
    """

    row: int
    queries: slice
    keys: Tensor
    mask: Callable[[], Tensor]


@dataclass
class _LeafAttention:
    """The attention of one pass over the leaf block: leaves also see the keys of the main block.

    Attributes:
        implementation: the name of the attention in transformers.
        kept: what the main block kept; each layer takes out its own.
        blocks: runs the queries in these blocks, each with a mask of its own over the keys that it
            sees; None to use the mask that the model was given.
    """

    implementation: str
    kept: Kept
    blocks: list[_LeafBlock] | None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | BlockMask | None,
        **kwargs: Any,
    ) -> Attended:
        """Runs the model's own attention on the keys of both blocks."""
        kept_key, kept_value = self.kept.pop(module)
        key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        own = _own_attention(self.implementation, module)
        if self.blocks is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        rows: dict[int, list[Tensor]] = {}
        for row, queries, keys, mask in self.blocks:
            k, v = (t[row : row + 1, :, keys] for t in (key, value))
            q = query[row : row + 1, :, queries]
            rows.setdefault(row, []).append(own(module, q, k, v, mask()[None, None], **kwargs)[0])
        return torch.cat([torch.cat(found, dim=1) for found in rows.values()]), None


def _block_mask(rule: Rule, row: int, queries: slice, keys: Tensor) -> Tensor:
    places = torch.arange(queries.start, queries.stop, device=keys.device)
    return rule(row, places[:, None], keys)


def _own_attention(implementation: str, module: nn.Module) -> Callable[..., Attended]:
    """Returns the model's own attention in one layer."""
    attention = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if attention is None:  # "eager" is a function in the file of the model
        attention = sys.modules[type(module).__module__].eager_attention_forward
    return cast(Callable[..., Attended], attention)


def _attend(
    module: nn.Module,
    *args: Any,
    tree: _MainAttention | _LeafAttention | None = None,
    **kwargs: Any,
) -> Attended:
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
    return tree(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)

Body = Callable[..., Tensor]


def run_tree(student: Student, batch: Batch, body: Body) -> tuple[Tensor, Tensor | None]:
    """Runs the body over the main block and the leaf block of a tree.

    With gradient checkpointing, a layer that runs again in the backward uses the same attention.

    Args:
        student: the student.
        batch: a batch with layout "tree".
        body: (student, block, mask, **kwargs) -> final hidden states.

    Returns:
        Hidden states of main block [B, L, H] and leaf block [B, L2, H] (None without leaves).
    """
    implementation = _attention_of(student, batch)
    parts = _parts(student, batch) if implementation == "sdpa" else None
    whole = cache(partial(_mask, implementation, student, batch, leaves=False))
    kept: Kept | None = None if batch.leaves is None else {}
    main = _MainAttention(implementation, kept, parts, whole)
    in_tree = partial(attention_set_to, student.config, _IMPLEMENTATION)
    # tree_attention needs no mask, but without one of 4 dimensions the model builds its own.
    no_mask = student.weight.new_zeros(1, 1, 1, 1)
    with in_tree(), checkpointed_within(student.checkpointable, in_tree):
        hidden = body(student, batch.main, no_mask if parts is not None else whole(), tree=main)
        if kept is None:
            return hidden, None
        main.kept = None
        assert batch.leaves is not None
        queries = batch.leaves.input_ids
        pairs = queries.numel() * (batch.main.input_ids.shape[1] + queries.shape[1])
        blocks = _leaf_blocks(batch) if parts is not None and pairs > LEAF_PAIRS else None
        leaf = _LeafAttention(implementation, kept, blocks)
        with torch.no_grad():
            mask = no_mask if blocks else _mask(implementation, student, batch, leaves=True)
            leaf_hidden = body(student, batch.leaves, mask, tree=leaf)
    return hidden, leaf_hidden


def _leaf_blocks(batch: Batch) -> list[_LeafBlock]:
    """Divides the leaf block into at most `LEAF_QUERIES` queries each, with the keys they see.

    A mask over one block is small, however long the row is.
    """
    host = batch.on_host
    numbers, (key_numbers, key_ends) = _seen(host, leaves=True)
    places, keys = [], []
    for row, of_row in enumerate(numbers):
        for first in range(0, len(of_row), LEAF_QUERIES):
            queries = slice(first, min(first + LEAF_QUERIES, len(of_row)))
            own = of_row[queries].sort().values
            # A key is seen if one of these numbers lies from its own up to its end.
            before, upto = (torch.searchsorted(own, at[row]) for at in (key_numbers, key_ends))
            places.append((row, queries))
            keys.append((upto > before).nonzero().flatten())
    keys = send(keys, batch.main.input_ids.device)
    keep = LEAF_QUERIES * sum(map(len, keys)) <= KEPT_PAIRS
    mask = partial(_block_mask, tree_rule(batch, leaves=True)[0])
    found = []
    for at, of in zip(places, keys, strict=True):
        make = partial(mask, *at, of)
        found.append(_LeafBlock(*at, of, cache(make) if keep else make))
    return found


def _attention_of(student: Student, batch: Batch) -> str:
    """Returns the attention for a tree: the student's own, or FlexAttention for long rows on CUDA.

    FlexAttention runs where flash attention does not, and not with gradient checkpointing, where it
    has not been tried on a GPU. To use it there, load the student with
    attn_implementation="flex_attention".
    """
    own = attention_implementation(student.config)
    long = batch.main.input_ids.is_cuda and batch.main.input_ids.shape[1] > FLEX_FROM
    if own == "sdpa" and long and not student.checkpoints and not _in_flash(student, batch):
        return "flex_attention"
    return own


def _in_flash(student: Student, batch: Batch) -> bool:
    """Whether flash attention runs on this device, in the dtype and head width of the student."""
    device, config = batch.main.input_ids.device, student.config
    dtype = autocast_dtype(device.type) or next(student.body.parameters()).dtype
    depth = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "v_head_dim", depth) != depth:  # keys and values differ in width
        return False
    return flash_supports(device, dtype, depth)


def _parts(student: Student, batch: Batch) -> Tensor | TreeTables | None:
    """Returns what `tree_attention` takes for prompts and rationales; None to use a mask.

    A masked pair of tokens costs as much as any other, and most pairs of a tree are masked (tokens
    of different rationales). A mask is used where tree_attention does not run.
    """
    device = batch.main.input_ids.device
    if device.type == "cpu":
        return batch.parts
    if not _in_flash(student, batch):
        return None
    assert batch.on_host.parts is not None
    tables = TreeTables.of(batch.on_host.parts, *batch.main.input_ids.shape)
    return tables.moved(partial(send, device=device))


def _seen(batch: Batch, *, leaves: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns what `tree_rule` compares: numbers of the queries; numbers and ends of the keys."""
    main, queries = batch.main, batch.leaves if leaves else batch.main
    assert queries is not None and queries.numbers is not None and queries.ends is not None
    assert main.numbers is not None and main.ends is not None
    keys = main.numbers, main.ends
    if leaves:
        keys = (
            torch.cat([keys[0], queries.numbers], dim=1),
            torch.cat([keys[1], queries.ends], dim=1),
        )
    return queries.numbers, keys


def tree_rule(batch: Batch, *, leaves: bool) -> tuple[Rule, int, int]:
    """Which key each query sees in a tree, as a function of indices.

    Args:
        batch: a batch with layout "tree".
        leaves: True: the rule of the leaf block, with keys of the main block, then of the leaf
            block. False: the rule of the main block.

    Returns:
        The rule (row, query, key) -> bool on index tensors that broadcast, and the number of
        queries and keys of a row.
    """
    numbers, (key_numbers, key_ends) = _seen(batch, leaves=leaves)

    def rule(row: Tensor | int, query: Tensor, key: Tensor) -> Tensor:
        number = numbers[row, query]
        return (key_numbers[row, key] <= number) & (number < key_ends[row, key])

    return rule, numbers.shape[1], key_numbers.shape[1]


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
    # The mask is added to the scores: every layer would have to convert a mask of bool. It is
    # computed in place, in one float32 buffer. Comparisons would take torch 3 times as long.
    numbers, (first, last) = _seen(batch, leaves=leaves)
    first, last = first[:, None].float(), last[:, None].float() - 1
    outside = numbers[:, :, None] - (first + last) / 2  # from the middle of a key's range
    outside.abs_().sub_((last - first) / 2)  # beyond its ends, at least 1; not above 0 inside
    dtype = student.weight.dtype
    return outside.clamp_(0, 1).to(dtype).mul_(torch.finfo(dtype).min)[:, None]
