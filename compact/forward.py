"""Runs one forward of the student over a batch: hidden states, token statistics, answer leaves.

The answer leaves are a second block of the same pass: their queries attend to the keys and values
that the main block left in every layer, so no token is computed twice, and nothing of them is
differentiated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compact.lean import lean
from compact.packing import tree_mask, tree_rule
from compact.passes import Batch, Pass
from compact.student import Student
from compact_ops import GoldAnswers, TokenStats, linear_token_stats

# Multiply-adds of one layer that a part of a row must save to be worth a call of its own on the
# CPU, which costs about 50 us forward and backward.
PART_WORTH = 2_000_000
# Tokens of a row on CUDA from which FlexAttention is used; below, a dense mask is small.
FLEX_FROM = 1024
_IMPLEMENTATION = "compact_keep_keys"
_UNGROUPED = nn.Module()  # to transformers' SDPA an attention whose keys have a head a query head


class _Part(NamedTuple):
    """A prompt or a rationale in a row of a tree.

    Attributes:
        size: its tokens.
        prompt: which part of the row is its prompt; None where it is a prompt itself.
        mask: [1, 1, size, prompt + size] additive: the prompt, and of the part what came before.
    """

    size: int
    prompt: int | None
    mask: Tensor


class _KeptKeys:
    """Keys and values of the main block, layer by layer, and the attention they are used in.

    Attributes:
        implementation: transformers' name of the attention.
        kept: by attention module, key and value [B, heads, L, D].
        mode: "keep" while the main block runs and leaves will follow, "read" while they run, "pass"
            without leaves.
        parts: of each row of the main block; None where the mask given to the model rules.
        folded: masks of parts, by `_folded_mask`.
    """

    def __init__(
        self, implementation: str, mode: Literal["pass", "keep"], parts: list[list[_Part]] | None
    ) -> None:
        self.implementation = implementation
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.mode: Literal["pass", "keep", "read"] = mode
        self.parts = parts
        self.folded: dict[tuple[int, int], Tensor] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | BlockMask | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, with the main block's keys in front while leaves run."""
        if self.mode == "read":
            kept_key, kept_value = self.kept.pop(module)
            key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        elif self.mode == "keep":
            self.kept[module] = (key.detach(), value.detach())
        attention = ALL_ATTENTION_FUNCTIONS.get(self.implementation)
        if attention is None:  # "eager" is a function of the model's own file
            attention = sys.modules[type(module).__module__].eager_attention_forward
        if self.parts is None or self.mode == "read":
            return attention(module, query, key, value, attention_mask, *args, **kwargs)
        groups = query.shape[1] // key.shape[1]
        if self.implementation != "sdpa":
            groups = 1
        rows = []
        # Split, not sliced: its backward is one cat where a slice's is a sum of padded tensors.
        for parts, *row in zip(
            self.parts, query.split(1), key.split(1), value.split(1), strict=True
        ):
            sizes = [part.size for part in parts]
            padding = query.shape[2] - sum(sizes)
            queries, keys, values = (t.split([*sizes, padding], dim=2) for t in row)
            outputs = []
            for i, part in enumerate(parts):
                seen = [i] if part.prompt is None else [part.prompt, i]
                k, v = (torch.cat([t[j] for j in seen], dim=2) for t in (keys, values))
                if groups == 1:
                    output = attention(module, queries[i], k, v, part.mask, *args, **kwargs)[0]
                else:  # query heads that share a key head become rows of one: no key is repeated
                    q = queries[i].reshape(1, k.shape[1], groups * part.size, -1)
                    mask = self._folded_mask(part, groups)
                    output = attention(_UNGROUPED, q, k, v, mask, *args, **kwargs)[0]
                    output = output.unflatten(1, (groups, part.size)).permute(0, 2, 3, 1, 4)
                    output = output.flatten(2, 3)
                outputs.append(output)
            outputs.append(outputs[0].new_zeros(1, padding, *outputs[0].shape[2:]))
            rows.append(torch.cat(outputs, dim=1))
        return torch.cat(rows), None

    def _folded_mask(self, part: _Part, groups: int) -> Tensor:
        """The part's mask under itself `groups` times; made once for all layers."""
        if (id(part), groups) not in self.folded:
            self.folded[id(part), groups] = part.mask.repeat(1, 1, groups, 1)
        return self.folded[id(part), groups]


_active: _KeptKeys | None = None


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    assert _active is not None, "called outside of run_pass"
    return _active.attend(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)


@contextmanager
def _attending(
    student: Student,
    attention: str,
    mode: Literal["pass", "keep"],
    parts: list[list[_Part]] | None,
) -> Iterator[_KeptKeys]:
    """Puts `_attend` in place of the body's attention.

    It is gone by the time a checkpointed layer runs again in backward: the main block's attention
    is the model's own, so the second run gives the same result without it.
    """
    global _active
    config = student.config
    own = config._attn_implementation
    kept = _KeptKeys(attention, mode, parts)
    before, _active = _active, kept
    config._attn_implementation_internal = _IMPLEMENTATION
    try:
        yield kept
    finally:
        config._attn_implementation_internal = own
        _active = before


def run_pass(
    student: Student,
    batch: Batch,
    *,
    head_grad: str = "auto",
    filter_eps: float = 0.0,
    part_worth: int = PART_WORTH,
) -> tuple[TokenStats, Tensor, Pass]:
    """Runs body and head over a batch.

    Args:
        student: the student; whether anything is differentiated follows from torch.is_grad_enabled
            and its parameters.
        batch: from `build_batch`, on the student's device.
        head_grad: as in `linear_token_stats`.
        filter_eps: as in `linear_token_stats`.
        part_worth: on the CPU the prompts and rationales of a tree attend one by one where that
            saves this many multiply-adds a layer for each; 0 for always.

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
            hidden, leaf_hidden = _run_tree(student, batch, part_worth)
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


def _run_tree(student: Student, batch: Batch, part_worth: int) -> tuple[Tensor, Tensor | None]:
    attention = _attention_of(student, batch)
    mode: Literal["pass", "keep"] = "pass" if batch.leaf_input_ids is None else "keep"
    parts = None
    if batch.input_ids.device.type == "cpu" and attention != "flex_attention":
        parts = _parts(student, batch, part_worth)
    with _attending(student, attention, mode, parts) as kept:
        if parts is None:
            mask = _mask(attention, student, batch, leaves=False)
        else:  # four dimensions, so that the model makes none of its own
            mask = torch.zeros(1, 1, 1, 1, dtype=student.weight.dtype)
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


def _parts(student: Student, batch: Batch, worth: int) -> list[list[_Part]] | None:
    """The rows in parts that attend one by one, None where one call with one mask is better.

    On a CPU a masked pair costs as much as any other, and most pairs of a tree are masked: tokens
    of different rationales. A checkpointed layer runs its second time with the whole mask.
    """
    if student.checkpoints:
        return None
    length = batch.input_ids.shape[1]
    offsets = batch.token_offsets.tolist()
    starts: list[dict[int, tuple[int, int | None]]] = [{} for _ in batch.input_ids]
    prompt_starts = []
    for row in batch.prompt_rows.tolist():
        b, last = divmod(row, length)
        size = int(batch.position_ids[b, last]) + 1
        prompt_starts.append(last + 1 - size)
        starts[b][last + 1 - size] = (size, None)
    for r, p in enumerate(batch.problem.tolist()):
        b, first = divmod(int(batch.token_rows[offsets[r]]), length)
        starts[b][first] = (offsets[r + 1] - offsets[r], prompt_starts[p])
    pairs = sum(
        size * (size + (0 if prompt is None else row[prompt][0]))
        for row in starts
        for size, prompt in row.values()
    )
    saved = len(starts) * length**2 - pairs
    if saved * student.weight.shape[1] < worth * sum(map(len, starts)):
        return None
    dtype = student.weight.dtype
    found = []
    for row in starts:
        order = {start: i for i, start in enumerate(sorted(row))}
        parts = []
        for start in order:
            size, prompt = row[start]
            before = 0 if prompt is None else row[prompt][0]
            mask = torch.full((size, before + size), torch.finfo(dtype).min, dtype=dtype)
            mask = mask.triu_(before + 1)[None, None]
            parts.append(_Part(size, None if prompt is None else order[prompt], mask))
        found.append(parts)
    return found


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
