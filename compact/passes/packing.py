"""Builds the tensors of one forward pass in a layout: trees that share the prompt, or padded rows.

A tree row has the prompts of its problems, then their rationales. A rationale is split into nodes
at its step ends. Answer leaves are in a separate block; because of the nodes, a leaf sees its
prefix and nothing else. One rule defines the mask: a token sees another token if its node sees the
node of the other token and its position is not smaller. Every rationale starts at the position
after its prompt, so the student reads it as if it were the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch
from torch import Tensor

from compact.passes.types import Batch, Block, EncodedProblem, EncodedRationale

Layout = Literal["tree", "padded"]


@dataclass
class _Row:
    """A row under construction: tokens, positions and (tree) nodes."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, node: int) -> int:
        """Appends tokens at positions start, start + 1, ...; returns the index of the first."""
        first = len(self.ids)
        self.ids.extend(ids)
        self.positions.extend(range(start, start + len(ids)))
        self.nodes.extend([node] * len(ids))
        return first


@dataclass
class _Tables:
    """The index tables of a batch under construction; rows are (row, column) until L is known."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    token_rows: list[tuple[int, int]] = field(default_factory=list)
    prompt_rows: list[tuple[int, int]] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    rationale: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    problem: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    leaf_counts: list[int] = field(default_factory=list)
    leaf_step: list[int] = field(default_factory=list)
    leaf_rows: list[tuple[int, int]] = field(default_factory=list)
    leaf_target: list[int] = field(default_factory=list)
    leaf_index: list[int] = field(default_factory=list)

    def add_rationale(self, problem: int, rationale: EncodedRationale) -> None:
        """Adds a rationale's tokens, without their rows."""
        index = len(self.token_counts)
        self.problem.append(problem)
        self.token_counts.append(len(rationale.ids))
        self.target.extend(rationale.ids)
        self.rationale.extend([index] * len(rationale.ids))
        step = [-1] * len(rationale.ids)
        for i, (start, end) in enumerate(rationale.steps):
            step[start:end] = [i] * (end - start)
        self.step.extend(step)

    def add_leaf(self, leaf: _Leaf, row: int, last_cue: int) -> None:
        """Adds an answer leaf whose last cue token is at (row, last_cue) of the leaf block."""
        index = len(self.leaf_step)
        self.leaf_step.append(leaf.step)
        self.leaf_rows.extend((row, last_cue + j) for j in range(len(leaf.gold)))
        self.leaf_target.extend(leaf.gold)
        self.leaf_index.extend([index] * len(leaf.gold))


@dataclass(frozen=True)
class _Leaf:
    """An answer leaf: the first `prefix` tokens of a rationale (None: no rationale), cue, gold."""

    rationale: EncodedRationale | None
    step: int
    prefix: int
    cue: tuple[int, ...]
    gold: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The input tokens, without the last gold token, which predicts nothing."""
        return self.cue + self.gold[:-1]


def _leaves(problem: EncodedProblem, rationale: EncodedRationale) -> Iterator[_Leaf]:
    """The answer leaves of one rationale, one after each step that has a leaf."""
    for i in rationale.asked_steps if problem.gold_ids else ():
        end = rationale.steps[i][1]
        cue = problem.spaced_cue_ids if rationale.spaced[i] else problem.cue_ids
        yield _Leaf(rationale, i, end, cue, problem.gold_ids)


def _question_leaf(problem: EncodedProblem) -> _Leaf:
    return _Leaf(None, -1, 0, problem.cue_ids, problem.gold_ids)


def question_leaves(problems: Sequence[EncodedProblem], first: int) -> list[int]:
    """Returns [P] the leaf after each bare question, counted from `first`; -1 without gold."""
    places = count(first)
    return [next(places) if problem.gold_ids else -1 for problem in problems]


def tree_length(problem: EncodedProblem) -> int:
    """Tokens of a problem in the main block of a tree: the prompt once and every rationale."""
    return len(problem.prompt_ids) + sum(len(r.ids) for r in problem.rationales)


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns problems to rows of at most `capacity` tokens: first fit, longest first.

    Args:
        lengths: tokens of each problem.
        capacity: tokens of a row; a longer problem gets a row of its own.

    Returns:
        The problems of each row, starting with the row of the longest problem, so that
        neighbouring rows need little padding.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, space in enumerate(free):
            if lengths[index] <= space:
                rows[row].append(index)
                free[row] -= lengths[index]
                break
        else:
            rows.append([index])
            free.append(max(capacity - lengths[index], 0))
    return rows


def build_batch(
    problems: Sequence[EncodedProblem],
    *,
    layout: Layout,
    leaves: bool,
    pad_token_id: int,
    row_capacity: int = 0,
) -> Batch:
    """Builds the tensors of one forward pass over `problems`.

    Args:
        problems: P >= 1 problems; the tables keep their order, the rows may not.
        layout: "tree" or "padded".
        leaves: whether answer leaves are built, for the problems that have a gold answer.
        pad_token_id: pads rows; no token of a problem sees it.
        row_capacity: tree only: problems share a row of at most this many tokens (0: one row per
            problem).

    Raises:
        ValueError: there are no problems, or the layout is unknown.
    """
    if not problems:
        raise ValueError("problems must hold at least one problem, got none")
    if layout not in ("tree", "padded"):
        raise ValueError(f"layout must be 'tree' or 'padded', got {layout!r}")
    build = _build_tree if layout == "tree" else _build_padded
    return build(problems, leaves, pad_token_id, row_capacity)


def _build_tree(
    problems: Sequence[EncodedProblem], leaves: bool, pad_token_id: int, row_capacity: int
) -> Batch:
    plan = plan_rows([tree_length(p) for p in problems], row_capacity)
    place = {p: b for b, row in enumerate(plan) for p in row}
    main = [_Row() for _ in plan]
    leaf = [_Row() for _ in plan]
    sees: list[list[list[int]]] = [[] for _ in plan]  # per row and node: the nodes it sees
    start: dict[int, int] = {}
    prompt_node: dict[int, int] = {}
    for b, members in enumerate(plan):
        for p in members:
            prompt_node[p] = _new_node(sees[b], [])
            start[p] = main[b].add(problems[p].prompt_ids, 0, prompt_node[p])
    # The plan orders the rows, but the tables follow the order of `problems`. So all prompts are
    # added first and the rationales after them; the order within a row does not matter.
    tables = _Tables()
    for p, problem in enumerate(problems):
        b, depth = place[p], len(problem.prompt_ids)
        last_prompt = (b, start[p] + depth - 1)
        tables.prompt_rows.append(last_prompt)
        for rationale in problem.rationales:
            tables.add_rationale(p, rationale)
            cuts = [end for _, end in rationale.steps]
            node_at = {}
            ancestors, previous, first = [prompt_node[p]], 0, len(main[b].ids)
            for cut in [*cuts, len(rationale.ids)]:
                if cut > previous:
                    node = _new_node(sees[b], ancestors)
                    main[b].add(rationale.ids[previous:cut], depth + previous, node)
                    ancestors, previous = [*ancestors, node], cut
                node_at[cut] = ancestors
            columns = range(first, first + len(rationale.ids))
            tables.token_rows.extend((b, c) for c in columns)
            tables.rows.append(last_prompt)
            tables.rows.extend((b, c) for c in columns[:-1])
            own = list(_leaves(problem, rationale)) if leaves else []
            for each in own:
                _plant(each, tables, b, leaf[b], sees[b], node_at[each.prefix], depth)
            tables.leaf_counts.append(len(own))
    if leaves:
        for p, problem in enumerate(problems):
            if not problem.gold_ids:
                continue
            b = place[p]
            depth = len(problem.prompt_ids)
            _plant(_question_leaf(problem), tables, b, leaf[b], sees[b], [prompt_node[p]], depth)
    # Padding sees itself: attention without any key would give NaN.
    pads = [_new_node(s, []) for s in sees]
    size = max(len(s) for s in sees)
    visible = torch.zeros(len(plan), size, size, dtype=torch.bool)
    for b, nodes in enumerate(sees):
        for node, seen in enumerate(nodes):
            visible[b, node, seen] = True
    return _finish(
        "tree", problems, main, leaf if leaves else [], tables, pad_token_id, visible, pads
    )


def _new_node(sees: list[list[int]], ancestors: list[int]) -> int:
    """Adds a node that sees its ancestors and itself."""
    sees.append([*ancestors, len(sees)])
    return len(sees) - 1


def _plant(
    leaf: _Leaf,
    tables: _Tables,
    b: int,
    row: _Row,
    sees: list[list[int]],
    ancestors: list[int],
    depth: int,
) -> None:
    """Adds one leaf to the leaf row of a tree."""
    first = row.add(leaf.ids, depth + leaf.prefix, _new_node(sees, ancestors))
    tables.add_leaf(leaf, b, first + len(leaf.cue) - 1)


def _build_padded(
    problems: Sequence[EncodedProblem], leaves: bool, pad_token_id: int, row_capacity: int
) -> Batch:
    del row_capacity  # always one row per rationale
    tables = _Tables()
    main: list[_Row] = []
    leaf: list[_Row] = []

    def add_leaf(problem: EncodedProblem, each: _Leaf) -> None:
        prefix = problem.prompt_ids + (each.rationale.ids[: each.prefix] if each.rationale else ())
        leaf.append(_Row())
        leaf[-1].add(prefix + each.ids, 0, 0)
        tables.add_leaf(each, len(leaf) - 1, len(prefix) + len(each.cue) - 1)

    for p, problem in enumerate(problems):
        depth = len(problem.prompt_ids)
        for rationale in problem.rationales:
            b = len(main)
            main.append(_Row())
            main[b].add(problem.prompt_ids + rationale.ids, 0, 0)
            tables.add_rationale(p, rationale)
            tables.prompt_rows.append((b, depth - 1))
            tables.rows.extend((b, depth - 1 + t) for t in range(len(rationale.ids)))
            tables.token_rows.extend((b, depth + t) for t in range(len(rationale.ids)))
            own = list(_leaves(problem, rationale)) if leaves else []
            for each in own:
                add_leaf(problem, each)
            tables.leaf_counts.append(len(own))
    if leaves:
        for problem in problems:
            if problem.gold_ids:
                add_leaf(problem, _question_leaf(problem))
        leaf = leaf or [_Row()]
    return _finish("padded", problems, main, leaf, tables, pad_token_id, None, None)


def _finish(
    layout: Layout,
    problems: Sequence[EncodedProblem],
    main: list[_Row],
    leaf: list[_Row],
    tables: _Tables,
    pad_token_id: int,
    visible: Tensor | None,
    pads: list[int] | None,
) -> Batch:
    """Pads the rows and turns (row, column) pairs into flat indices."""
    if leaf and not any(row.ids for row in leaf):
        leaf[0].add([pad_token_id], 0, pads[0] if pads else 0)
    main_block = _stack(main, pad_token_id, pads)
    leaf_block = _stack(leaf, pad_token_id, pads) if leaf else None
    length = main_block.input_ids.shape[1]
    leaf_length = leaf_block.input_ids.shape[1] if leaf_block else 0
    question_leaf = [-1] * len(problems)
    if leaf:
        question_leaf = question_leaves(problems, sum(tables.leaf_counts))
    gold = [problem.gold_ids for problem in problems]
    return Batch(
        layout=layout,
        main=main_block,
        leaves=leaf_block,
        visible=visible,
        problems=tuple(problems),
        problem_offsets=_offsets([len(p.rationales) for p in problems]),
        problem=_tensor(tables.problem),
        token_offsets=_offsets(tables.token_counts),
        rows=_flat(tables.rows, length),
        target=_tensor(tables.target),
        rationale=_tensor(tables.rationale),
        step=_tensor(tables.step),
        token_rows=_flat(tables.token_rows, length),
        prompt_rows=_flat(tables.prompt_rows, length),
        gold_ids=_tensor([token for ids in gold for token in ids]),
        gold_offsets=_offsets([len(ids) for ids in gold]),
        leaf_offsets=_offsets(tables.leaf_counts),
        leaf_step=_tensor(tables.leaf_step),
        question_leaf=_tensor(question_leaf),
        leaf_rows=_flat(tables.leaf_rows, leaf_length),
        leaf_target=_tensor(tables.leaf_target),
        leaf_index=_tensor(tables.leaf_index),
    )


def _stack(rows: list[_Row], pad_token_id: int, pads: list[int] | None) -> Block:
    """Right-pads the rows; `pads` is the padding node of each row, None if rows have no nodes."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    # Positions continue over the padding, as in a model called without position ids: the `released`
    # scores read padding too.
    positions = torch.arange(length).repeat(len(rows), 1)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    nodes = None if pads is None else _tensor(pads)[:, None].repeat(1, length)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n] = _tensor(row.ids)
        positions[b, :n] = _tensor(row.positions)
        mask[b, :n] = 1
        if nodes is not None:
            nodes[b, :n] = _tensor(row.nodes)
    return Block(ids, positions, mask, nodes)


def _tensor(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _offsets(counts: Sequence[int]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), _tensor(counts).cumsum(0)])


def _flat(pairs: Sequence[tuple[int, int]], length: int) -> Tensor:
    return _tensor([row * length + column for row, column in pairs])


def tree_rule(
    batch: Batch, *, leaves: bool
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int, int]:
    """Which key each query sees in a tree, as a function of indices.

    Args:
        batch: a batch with layout "tree".
        leaves: True: the rule of the leaf block, with keys of the main block, then of the leaf
            block. False: the rule of the main block.

    Returns:
        The rule (row, query, key) -> bool on index tensors that broadcast, and the number of
        queries and keys of a row.
    """
    visible, key_nodes, key_positions = batch.visible, batch.main.segments, batch.main.position_ids
    assert key_nodes is not None and visible is not None
    query_nodes, query_positions = key_nodes, key_positions
    if leaves:
        assert batch.leaves is not None and batch.leaves.segments is not None
        query_nodes, query_positions = batch.leaves.segments, batch.leaves.position_ids
        key_nodes = torch.cat([key_nodes, query_nodes], dim=1)
        key_positions = torch.cat([key_positions, query_positions], dim=1)

    def rule(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible[row, query_nodes[row, query], key_nodes[row, key]]
        return seen & (key_positions[row, key] <= query_positions[row, query])

    return rule, query_nodes.shape[1], key_nodes.shape[1]


def tree_mask(batch: Batch, *, leaves: bool) -> Tensor:
    """`tree_rule` as a mask for scaled_dot_product_attention.

    Returns:
        [B, 1, L, L], or [B, 1, L2, L + L2] for the leaves: bool, True where the query sees the key.
    """
    rule, queries, keys = tree_rule(batch, leaves=leaves)
    device = batch.main.input_ids.device
    row = torch.arange(len(batch.main.input_ids), device=device)[:, None, None]
    query = torch.arange(queries, device=device)[:, None]
    return rule(row, query, torch.arange(keys, device=device))[:, None]
