"""Builds the tensors of one forward pass in a layout: trees that share the prompt, or padded rows.

A tree row has the prompts of its problems, then their rationales. A problem that is too long for a
row lies in several rows, each with its prompt; everything but the rows is the same. A rationale is
split into nodes where leaves read it. Answer leaves are in a separate block, as nodes of the same
tree. The tokens of a row are numbered depth first, so those that see a token (what follows in its
node, and every node below) have the numbers from its own up to an end: that one rule is the mask.
Every rationale starts at the position after its prompt, so the student reads it as if it were the
only one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from os.path import commonprefix
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compact.passes.types import Batch, Block, EncodedProblem, EncodedRationale, OptionLeaves

Layout = Literal["tree", "padded"]


IntArray = npt.NDArray[np.int64]
Span = tuple[int, int, int]  # tokens that lie side by side: their row, first column and count


@dataclass
class _Row:
    """A row under construction: its tokens, and the runs in which they were added."""

    ids: list[int] = field(default_factory=list)
    runs: list[tuple[int, int, int]] = field(default_factory=list)  # first position, tokens, node

    def add(self, ids: Sequence[int], start: int, node: int = 0) -> int:
        """Appends tokens at positions start, start + 1, ...; returns the column of the first."""
        first = len(self.ids)
        self.runs.append((start, len(ids), node))
        self.ids += ids
        return first


@dataclass
class _Tree:
    """A row of a tree under construction: its two blocks and the nodes of both.

    Attributes:
        main, leaves: the row of the main block and of the leaf block.
        parents: of each node, an earlier node; -1 for none.
        sizes: the tokens of each node.
    """

    main: _Row = field(default_factory=_Row)
    leaves: _Row = field(default_factory=_Row)
    parents: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def grow(
        self, block: _Row, ids: Sequence[int], start: int, parent: int = -1
    ) -> tuple[int, int]:
        """Adds tokens that see the nodes above; returns their node and the column of the first."""
        node = len(self.parents)
        self.parents.append(parent)
        self.sizes.append(len(ids))
        return node, block.add(ids, start, node)

    def numbered(self) -> tuple[list[int], list[int]]:
        """Numbers the tokens depth first.

        Returns:
            The number of the first token of each node, and the first number after its subtree.
        """
        subtree = list(self.sizes)
        for node in reversed(range(len(subtree))):
            if self.parents[node] >= 0:
                subtree[self.parents[node]] += subtree[node]
        free = [0] * len(subtree) + [0]  # the next number under each node; last: under no node
        numbers = []
        for node, parent in enumerate(self.parents):
            numbers.append(free[parent])
            free[node] = free[parent] + self.sizes[node]
            free[parent] += subtree[node]
        return numbers, [number + size for number, size in zip(numbers, subtree, strict=True)]


@dataclass
class _LeafTokens:
    """The tokens that leaves ask for: what predicts them, their ids, and how many in each leaf."""

    spans: list[Span] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, targets: Sequence[Sequence[int]], spans: Sequence[Span]) -> None:
        """Adds targets as the next leaves; see `_Tables.add_leaf`."""
        self.spans.extend(spans)
        for ids in targets:
            self.target.extend(ids)
            self.counts.append(len(ids))


@dataclass
class _Tables:
    """The index tables of a batch under construction; places are spans until L is known."""

    rows: list[Span] = field(default_factory=list)
    token_rows: list[Span] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    problem: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    leaf_counts: list[int] = field(default_factory=list)
    leaf_step: list[int] = field(default_factory=list)
    leaf_tokens: _LeafTokens = field(default_factory=_LeafTokens)
    option_counts: list[int] = field(default_factory=list)
    option_tokens: _LeafTokens = field(default_factory=_LeafTokens)

    def add_rationale(
        self, problem: int, rationale: EncodedRationale, before: tuple[int, int], at: Span
    ) -> None:
        """Adds a rationale at `at`; `before` is the row and column of the token before it."""
        row, first, count = at
        self.problem.append(problem)
        self.token_counts.append(count)
        self.target.extend(rationale.ids)
        self.token_rows.append(at)
        self.rows += [(*before, 1), (row, first, count - 1)] if count else []
        step = [-1] * count
        for i, (start, end) in enumerate(rationale.steps):
            step[start:end] = [i] * (end - start)
        self.step.extend(step)

    def add_leaf(self, leaf: _Leaf, spans: Sequence[Span]) -> None:
        """Adds a leaf; `spans` are what predicts the tokens of its targets, in their order."""
        if leaf.options:
            self.option_tokens.add(leaf.targets, spans)
            self.option_counts.append(len(leaf.targets))
        else:
            self.leaf_tokens.add(leaf.targets, spans)
            self.leaf_step.append(leaf.step)


class _Leaf(NamedTuple):
    """One place where the student is asked for one or more answers.

    Attributes:
        rationale: the rationale that is read before; None for the bare question.
        step: the last step that is read; -1 for the bare question.
        prefix: how many tokens of the rationale are read in the main block, after the prompt; None
            if nothing is read there.
        trunk: the tokens that follow in the leaf block: a prompt and steps, if they are not those
            of the main block, and the cue.
        targets: the answers that are asked for, each on its own.
        options: whether the targets are the options of the problem, else the gold answer.
    """

    rationale: EncodedRationale | None
    step: int
    prefix: int | None
    trunk: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    options: bool = False


def _leaves(problem: EncodedProblem, rationale: EncodedRationale) -> Iterator[_Leaf]:
    """The answer leaves of one rationale, one after each step that has a leaf."""
    for i in rationale.asked_steps if problem.gold_ids else ():
        end = rationale.steps[i][1]
        cue = problem.spaced_cue_ids if rationale.spaced[i] else problem.cue_ids
        yield _Leaf(rationale, i, end, cue, (problem.gold_ids,))


def _option_leaves(problem: EncodedProblem, rationale: EncodedRationale) -> Iterator[_Leaf]:
    """The option leaves of one rationale, without those that stand after the question alone.

    Steps are read in the main block if they are the first ones, without a gap, and if its prompt is
    the one to read. The student must not see what stands in a gap, so later steps are read once
    more in the leaf block.
    """
    options = problem.options
    assert options is not None
    for reading in rationale.option_readings if options.ids else ():
        if not reading:
            continue
        kept = next((n for n, step in enumerate(reading) if n != step), len(reading))
        prefix: int | None = rationale.steps[kept - 1][1] if kept else 0
        prompt: tuple[int, ...] = ()
        if options.prompt_ids is not None:
            prompt, prefix, kept = options.prompt_ids, None, 0
        lead = () if kept else rationale.ids[: rationale.steps[0][0]]
        again = [t for i in reading[kept:] for t in rationale.ids[slice(*rationale.steps[i])]]
        cue = options.spaced_cue_ids if rationale.spaced[reading[-1]] else options.cue_ids
        trunk = (*prompt, *lead, *again, *cue)
        yield _Leaf(rationale, reading[-1], prefix, trunk, options.ids, options=True)


def _question_leaf(problem: EncodedProblem) -> _Leaf:
    return _Leaf(None, -1, 0, problem.cue_ids, (problem.gold_ids,))


def _question_options(problem: EncodedProblem) -> _Leaf:
    options = problem.options
    assert options is not None
    prefix = 0 if options.prompt_ids is None else None
    trunk = (*(options.prompt_ids or ()), *options.cue_ids)
    return _Leaf(None, -1, prefix, trunk, options.ids, options=True)


def question_leaves(problems: Sequence[EncodedProblem], first: int) -> list[int]:
    """Returns [P] the leaf after each bare question, counted from `first`; -1 without gold."""
    places = count(first)
    return [next(places) if problem.gold_ids else -1 for problem in problems]


def tree_length(problem: EncodedProblem) -> int:
    """Tokens of a problem in the main block of a tree: the prompt once and every rationale."""
    return len(problem.prompt_ids) + sum(len(r.ids) for r in problem.rationales)


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns parts to rows of at most `capacity` tokens: first fit, longest first.

    Args:
        lengths: tokens of each part.
        capacity: tokens of a row; a longer part gets a row of its own.

    Returns:
        The parts of each row, starting with the row of the longest part, so that neighbouring rows
        need little padding.
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
    row_limit: int | None = None,
    options: bool = False,
) -> Batch:
    """Builds the tensors of one forward pass over `problems`.

    Args:
        problems: P >= 1 problems; the tables keep their order, the rows may not.
        layout: "tree" or "padded".
        leaves: whether answer leaves are built, for the problems that have a gold answer.
        pad_token_id: pads rows; no token of a problem sees it.
        row_capacity: tree only: problems share a row of at most this many tokens (0: one row per
            problem).
        row_limit: tree only: a problem with more tokens of prompt and rationales is packed over
            several rows; a rationale that is longer with its prompt gets a row of its own. None: a
            problem lies in one row.
        options: whether option leaves are built.

    Raises:
        ValueError: there are no problems, the layout is unknown, or option leaves are asked for and
            a problem was encoded without options.
    """
    if not problems:
        raise ValueError("problems must hold at least one problem, got none")
    if layout not in ("tree", "padded"):
        raise ValueError(f"layout must be 'tree' or 'padded', got {layout!r}")
    for problem in problems if options else ():
        if problem.options is None:
            raise ValueError(
                f"problems must be encoded with options=True for option leaves, "
                f"got question_id {problem.question_id!r} without"
            )
    asked = _Asked(leaves, options)
    if layout == "tree":
        plan = _plan(problems, row_capacity, row_limit)
        return _build_tree(problems, plan, asked, pad_token_id)
    return _build_padded(problems, asked, pad_token_id)


@dataclass(frozen=True)
class _Asked:
    """Which leaves are built: for the gold answer, for the options."""

    gold: bool
    options: bool

    def of_rationale(self, problem: EncodedProblem, rationale: EncodedRationale) -> list[_Leaf]:
        gold = _leaves(problem, rationale) if self.gold else ()
        return [*gold, *(_option_leaves(problem, rationale) if self.options else ())]

    def of_question(self, problem: EncodedProblem) -> list[_Leaf]:
        gold = [_question_leaf(problem)] if self.gold and problem.gold_ids else []
        return [*gold, *([_question_options(problem)] if self.options else [])]


@dataclass(frozen=True)
class _Share:
    """Rationales of one problem that lie in the same row, by their indices."""

    problem: int
    rationales: tuple[int, ...]


def _plan(
    problems: Sequence[EncodedProblem], row_capacity: int, row_limit: int | None
) -> list[list[_Share]]:
    """Decides which rationales lie in which row; arguments as in `build_batch`."""
    shares, lengths = [], []
    for p, problem in enumerate(problems):
        prompt, own = len(problem.prompt_ids), [len(r.ids) for r in problem.rationales]
        most = sum(own) if row_limit is None else row_limit - prompt
        for members in plan_rows(own, most):
            shares.append(_Share(p, tuple(members)))
            lengths.append(prompt + sum(own[k] for k in members))
    return [[shares[i] for i in row] for row in plan_rows(lengths, row_capacity)]


def _build_tree(
    problems: Sequence[EncodedProblem],
    plan: Sequence[Sequence[_Share]],
    asked: _Asked,
    pad_token_id: int,
) -> Batch:
    trees = [_Tree() for _ in plan]
    place: dict[tuple[int, int], int] = {}  # problem and rationale -> row
    prompts: dict[tuple[int, int], tuple[int, int]] = {}  # problem and row -> node, first column
    parts = []
    for b, shares in enumerate(plan):
        for share in shares:
            p, ids = share.problem, problems[share.problem].prompt_ids
            place |= {(p, k): b for k in share.rationales}
            prompts[p, b] = _, first = trees[b].grow(trees[b].main, ids, 0)
            parts.append((b, first, first + len(ids), 0, 0))
    # The plan orders the rows, but the tables follow the order of `problems`. So all prompts are
    # added first and the rationales after them; the order within a row does not matter.
    tables = _Tables()
    for p, problem in enumerate(problems):
        depth = len(problem.prompt_ids)
        for k, rationale in enumerate(problem.rationales):
            b = place[p, k]
            tree, (node, prompt) = trees[b], prompts[p, b]
            own = asked.of_rationale(problem, rationale)
            first, previous, node_at = len(tree.main.ids), 0, {0: node}
            for cut in sorted({each.prefix or 0 for each in own} | {len(rationale.ids)}):
                if cut > previous:
                    ids = rationale.ids[previous:cut]
                    node_at[cut] = node = tree.grow(tree.main, ids, depth + previous, node)[0]
                    previous = cut
            at = b, first, len(rationale.ids)
            tables.add_rationale(p, rationale, (b, prompt + depth - 1), at)
            parts.append((b, first, len(tree.main.ids), prompt, prompt + depth))
            for each in own:
                tables.add_leaf(each, _plant(each, b, tree, node_at, depth))
            tables.leaf_counts.append(sum(not each.options for each in own))
    for p, problem in enumerate(problems):
        b, depth = place[p, 0], len(problem.prompt_ids)
        for each in asked.of_question(problem):
            spans = _plant(each, b, trees[b], {0: prompts[p, b][0]}, depth)
            tables.add_leaf(each, spans)
    if not any(tree.leaves.ids for tree in trees):
        trees[0].grow(trees[0].leaves, [pad_token_id], 0)  # see `Batch.leaves`
    main, leaves = [tree.main for tree in trees], [tree.leaves for tree in trees]
    return _finish("tree", problems, main, leaves, tables, asked, pad_token_id, trees, parts)


def _plant(leaf: _Leaf, b: int, tree: _Tree, node_at: Mapping[int, int], depth: int) -> list[Span]:
    """Adds one leaf to row b of a tree: what its targets share once, then a node for each.

    The last token of a target predicts nothing and is left out. node_at[n] is the node of token n
    of the rationale, counted from 1; node_at[0] that of the prompt, which has `depth` tokens.

    Returns:
        What predicts the tokens of its targets, in their order.
    """
    start, parent = 0, -1
    if leaf.prefix is not None:
        start, parent = depth + leaf.prefix, node_at[leaf.prefix]
    inputs = [target[:-1] for target in leaf.targets]
    if not inputs:  # a question without options
        return []
    shared: Sequence[int] = commonprefix(inputs)
    node, first = tree.grow(tree.leaves, (*leaf.trunk, *shared), start, parent)
    below = start + len(leaf.trunk) + len(shared)
    spans = []
    for tokens in inputs:
        spans.append((b, first + len(leaf.trunk) - 1, len(shared) + 1))
        own = tokens[len(shared) :]
        if own:
            spans.append((b, tree.grow(tree.leaves, own, below, node)[1], len(own)))
    return spans


def _build_padded(problems: Sequence[EncodedProblem], asked: _Asked, pad_token_id: int) -> Batch:
    tables = _Tables()
    main: list[_Row] = []
    leaf: list[_Row] = []

    def add_leaf(problem: EncodedProblem, each: _Leaf) -> None:
        prefix = each.trunk
        if each.prefix is not None:
            read = each.rationale.ids[: each.prefix] if each.rationale else ()
            prefix = problem.prompt_ids + read + prefix
        spans = []
        for target in each.targets:
            spans.append((len(leaf), len(prefix) - 1, len(target)))
            leaf.append(_Row())
            leaf[-1].add(prefix + target[:-1], 0)
        tables.add_leaf(each, spans)

    for p, problem in enumerate(problems):
        depth = len(problem.prompt_ids)
        for rationale in problem.rationales:
            b = len(main)
            main.append(_Row())
            main[b].add(problem.prompt_ids + rationale.ids, 0)
            at = b, depth, len(rationale.ids)
            tables.add_rationale(p, rationale, (b, depth - 1), at)
            own = asked.of_rationale(problem, rationale)
            for each in own:
                add_leaf(problem, each)
            tables.leaf_counts.append(sum(not each.options for each in own))
    for problem in problems:
        for each in asked.of_question(problem):
            add_leaf(problem, each)
    if not leaf:
        leaf.append(_Row())
        leaf[0].add([pad_token_id], 0)  # see `Batch.leaves`
    return _finish("padded", problems, main, leaf, tables, asked, pad_token_id)


def _finish(
    layout: Layout,
    problems: Sequence[EncodedProblem],
    main: list[_Row],
    leaf: list[_Row],
    tables: _Tables,
    asked: _Asked,
    pad_token_id: int,
    trees: Sequence[_Tree] | None = None,
    parts: Sequence[tuple[int, ...]] = (),
) -> Batch:
    """Pads the rows and turns spans into flat indices; `trees` and `parts` for layout "tree"."""
    numbers = None if trees is None else [tree.numbered() for tree in trees]
    main_block = _stack(main, pad_token_id, numbers)
    leaf_block = None
    if asked.gold or asked.options:
        leaf_block = _stack(leaf, pad_token_id, numbers)
    length = main_block.input_ids.shape[1]
    leaf_length = leaf_block.input_ids.shape[1] if leaf_block else 0
    question_leaf = [-1] * len(problems)
    if asked.gold:
        question_leaf = question_leaves(problems, sum(tables.leaf_counts))
    gold = [problem.gold_ids for problem in problems]
    return Batch(
        layout=layout,
        main=main_block,
        leaves=leaf_block,
        parts=_tensor(parts).reshape(-1, 5) if trees is not None else None,
        problems=tuple(problems),
        problem_offsets=_offsets([len(p.rationales) for p in problems]),
        problem=_tensor(tables.problem),
        token_offsets=_offsets(tables.token_counts),
        rows=_flat(tables.rows, length),
        target=_tensor(tables.target),
        rationale=_places(tables.token_counts),
        step=_tensor(tables.step),
        token_rows=_flat(tables.token_rows, length),
        gold_ids=_tensor([token for ids in gold for token in ids]),
        gold_offsets=_offsets([len(ids) for ids in gold]),
        leaf_offsets=_offsets(tables.leaf_counts),
        leaf_step=_tensor(tables.leaf_step),
        question_leaf=_tensor(question_leaf),
        leaf_rows=_flat(tables.leaf_tokens.spans, leaf_length),
        leaf_target=_tensor(tables.leaf_tokens.target),
        leaf_index=_places(tables.leaf_tokens.counts),
        options=_option_tables(problems, tables, leaf_length) if asked.options else None,
    )


def _option_tables(
    problems: Sequence[EncodedProblem], tables: _Tables, leaf_length: int
) -> OptionLeaves:
    """Finds the places of each rationale; the leaves are in the order of the tables."""
    questions = len(tables.option_counts) - len(problems)
    unstated, whole, gold, place = [], [], [], 0
    for p, problem in enumerate(problems):
        assert problem.options is not None
        gold.append(problem.options.gold)
        for rationale in problem.rationales:
            mine = []
            for reading in rationale.option_readings if problem.options.ids else ((),):
                mine.append(place if reading else questions + p)
                place += bool(reading)
            unstated.append(mine[0])
            whole.append(mine[-1])
    return OptionLeaves(
        offsets=_offsets(tables.option_counts),
        question=_tensor(range(questions, len(tables.option_counts))),
        unstated=_tensor(unstated),
        whole=_tensor(whole),
        gold=_tensor(gold),
        rows=_flat(tables.option_tokens.spans, leaf_length),
        target=_tensor(tables.option_tokens.target),
        index=_places(tables.option_tokens.counts),
    )


def _stack(
    rows: list[_Row], pad_token_id: int, numbers: Sequence[tuple[list[int], list[int]]] | None
) -> Block:
    """Returns the rows, padded on the right.

    Args:
        rows: the rows.
        pad_token_id: fills them up.
        numbers: for a tree, what `_Tree.numbered` returned for each row; None for padded rows.
    """
    lengths = np.array([len(row.ids) for row in rows])
    inside = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(inside.shape, pad_token_id)
    ids[inside] = [token for row in rows for token in row.ids]
    runs = [run for row in rows for run in row.runs]
    starts, counts, _ = np.array(runs, dtype=np.int64).reshape(-1, 3).T
    # Positions continue over the padding, as in a model called without position ids: the `released`
    # scores read padding too. They end at the largest one of a token, because in a tree a row is
    # longer than its rationales, and a table of learned positions may have no entry beyond them.
    last = (starts + counts).max(initial=1) - 1
    positions = np.minimum(np.arange(lengths.max()), last)[None].repeat(len(rows), axis=0)
    positions[inside] = _ranges(starts, counts)
    block = _tensor(ids), _tensor(positions), _tensor(inside.astype(np.int64))
    if numbers is None:
        return Block(*block, None, None)
    # Padding sees itself: attention without any key would give NaN.
    after = np.array([max(ends, default=0) for _, ends in numbers])[:, None]
    seen_from, seen_to = (np.broadcast_to(each, ids.shape).copy() for each in (after, after + 1))
    each_row = zip(rows, numbers, strict=True)
    of_run = [(f[node], e[node]) for row, (f, e) in each_row for *_, node in row.runs]
    firsts, ends = np.array(of_run, dtype=np.int64).reshape(-1, 2).T
    seen_from[inside], seen_to[inside] = _ranges(firsts, counts), ends.repeat(counts)
    return Block(*block, _tensor(seen_from), _tensor(seen_to))


def _ranges(firsts: IntArray, counts: IntArray) -> IntArray:
    """Returns first, first + 1, ..., `count` numbers of each range, one range after the other."""
    before = counts.cumsum() - counts
    found: IntArray = (firsts - before).repeat(counts) + np.arange(counts.sum())
    return found


def _tensor(values: Sequence[int] | Sequence[Sequence[int]] | IntArray) -> Tensor:
    array = np.asarray(values, dtype=np.int64)  # torch takes three times as long for a list
    # An empty array of numpy has a stride of 0.
    return torch.from_numpy(array) if array.size else torch.empty(array.shape, dtype=torch.int64)


def _offsets(counts: Sequence[int]) -> Tensor:
    return _tensor([0, *counts]).cumsum(0)


def _places(counts: Sequence[int]) -> Tensor:
    """Returns the index of each of the consecutive groups of `counts`, once for each member."""
    return _tensor(np.arange(len(counts)).repeat(counts))


def _flat(spans: Sequence[Span], length: int) -> Tensor:
    """Returns the indices of the tokens of spans in rows of `length` that are flattened."""
    rows, columns, counts = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    return _tensor(_ranges(rows * length + columns, counts))
