"""Builds consensus graphs in plain Python, for an installation without native libraries.

It follows csrc/graph/graph.cpp, whose results it equals except where a cosine is within a rounding
error of the middle between two whole similarities.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rustworkx as rx

UNITS = 4096
"""Similarities are rounded to whole multiples of 1 / UNITS."""
PLACES = 1 << 20
"""A place in a rationale, 0..1, is rounded to whole multiples of 1 / PLACES."""


class Step(NamedTuple):
    """A step as plain Python values."""

    equations: frozenset[int]
    numbers: frozenset[int]
    content: int
    state: tuple[float, ...]


def plain_steps(
    item_offsets: np.ndarray, items: np.ndarray, content: np.ndarray, state: np.ndarray
) -> list[Step]:
    """Returns the steps that the arrays of `Steps` describe."""
    mine = (items[a:b].tolist() for a, b in itertools.pairwise(item_offsets.tolist()))
    return [
        Step(frozenset(i for i in some if i % 2), frozenset(i for i in some if not i % 2), c, (*s,))
        for some, c, s in zip(mine, content.tolist(), state.tolist(), strict=True)
    ]


def similarity(one: Step, two: Step) -> int:
    """Returns 0..UNITS: mathematics by shared equations or else numbers, words by their states."""
    if bool(one.numbers | one.equations) != bool(two.numbers | two.equations):
        return 0
    if not one.numbers | one.equations:
        if not one.state:
            return UNITS * (one.content == two.content)
        return round(UNITS * sum(a * b for a, b in zip(one.state, two.state, strict=True)))
    if one.equations & two.equations:
        return UNITS
    either = one.numbers | two.numbers
    return round(UNITS * len(one.numbers & two.numbers) / len(either)) if either else 0


def chain(one: Sequence[Step], two: Sequence[Step], threshold: float) -> list[tuple[int, int]]:
    """Mutual best matches of two rationales, the order-preserving chain of greatest similarity."""
    if not one or not two:
        return []
    table = [[similarity(a, b) for b in two] for a in one]
    best_of_row = [max(row) for row in table]
    best_of_column = [max(column) for column in zip(*table, strict=True)]
    least = round(UNITS * threshold)
    total = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            best = max(total[i][j + 1], total[i + 1][j])
            if value >= least and value == best_of_row[i] == best_of_column[j]:
                best = max(best, total[i][j] + value)
            total[i + 1][j + 1] = best
    found, i, j = [], len(one), len(two)
    while i and j:
        if total[i][j] == total[i - 1][j]:
            i -= 1
        elif total[i][j] == total[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append((i, j))
    return found


def assemble(
    problem_offsets: np.ndarray,
    step_offsets: np.ndarray,
    item_offsets: np.ndarray,
    items: np.ndarray,
    content: np.ndarray,
    state: np.ndarray,
    threshold: float,
) -> dict[str, np.ndarray]:
    """Returns what `_graph.assemble` does; edges of one rank may be in another order."""
    steps = plain_steps(item_offsets, items, content, state)
    starts = step_offsets.tolist()
    matches: list[tuple[int, int]] = []
    step_class: list[int] = []
    class_offsets, edge_offsets = [0], [0]
    members: list[int] = []
    edges: list[tuple[int, int]] = []
    edge_count: list[int] = []
    for first, end in itertools.pairwise(problem_offsets.tolist()):
        spans = [range(starts[r], starts[r + 1]) for r in range(first, end)]
        mine = _matches([(span, [steps[i] for i in span]) for span in spans], threshold)
        classes = _classes(range(starts[first], starts[end]), mine)
        paths = [[classes[step] for step in span] for span in spans]
        count = max(classes.values(), default=-1) + 1
        kept = _edges(paths, count)
        before = class_offsets[-1]
        matches += mine
        step_class += [before + name for path in paths for name in path]
        having = Counter(name for path in paths for name in set(path))
        members += [having[name] for name in range(count)]
        class_offsets.append(before + count)
        edges += [(before + a, before + b) for a, b in kept]
        edge_count += kept.values()
        edge_offsets.append(len(edges))
    return {
        "matches": np.array(matches, np.int64).reshape(-1, 2),
        "step_class": np.array(step_class, np.int64),
        "class_offsets": np.array(class_offsets, np.int64),
        "class_members": np.array(members, np.int64),
        "edge_offsets": np.array(edge_offsets, np.int64),
        "edges": np.array(edges, np.int64).reshape(-1, 2),
        "edge_count": np.array(edge_count, np.int64),
    }


def _matches(
    rationales: Sequence[tuple[range, Sequence[Step]]], threshold: float
) -> list[tuple[int, int]]:
    """Returns the pairs of steps of one problem that match.

    Of two rationales the one that comes first by its steps is matched first, so that ties do not
    depend on the order of the input.
    """
    found = []
    for one, two in itertools.combinations(rationales, 2):
        (a, first), (b, second) = sorted((one, two), key=_content)
        found += [(a[i], b[j]) for i, j in chain(first, second, threshold)]
    return found


def _content(rationale: tuple[range, Sequence[Step]]) -> tuple[list[int], list[float]]:
    steps = rationale[1]
    return [step.content for step in steps], [x for step in steps for x in step.state]


def _classes(steps: range, matches: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Returns the class of each step, numbered in the order of their first steps."""
    graph = rx.PyGraph()
    graph.add_nodes_from(steps)
    graph.add_edges_from_no_data([(a - steps.start, b - steps.start) for a, b in matches])
    parts = sorted(rx.connected_components(graph), key=min)
    return {steps[i]: name for name, part in enumerate(parts) for i in part}


def _edges(paths: Sequence[Sequence[int]], classes: int) -> dict[tuple[int, int], int]:
    """Returns the edges between the classes of one problem, with their counts, without cycles.

    They are added in the order of their rank: more common ones first, then those that go further
    forward in the rationales. Edges of one rank that are on a cycle are left out together.
    """
    places: list[list[int]] = [[] for _ in range(classes)]
    for path in paths:
        for i, name in enumerate(path):
            places[name].append(round(PLACES * (i / (len(path) - 1) if len(path) > 1 else 1.0)))
    mean = [sum(some) / len(some) for some in places]
    follows = Counter(
        pair
        for path in paths
        for pair in sorted(set(itertools.pairwise(path)))
        if pair[0] != pair[1]
    )

    def rank(edge: tuple[int, int]) -> tuple[float, ...]:
        a, b = edge
        return -follows[edge], mean[a] - mean[b], mean[a], mean[b]

    graph = rx.PyDiGraph()
    graph.add_nodes_from(range(classes))
    kept: dict[tuple[int, int], int] = {}
    for _, group in itertools.groupby(sorted(follows, key=rank), key=rank):
        edges = list(group)
        graph.add_edges_from_no_data(edges)
        closing = [(a, b) for a, b in edges if rx.has_path(graph, b, a)]
        graph.remove_edges_from(closing)
        kept |= {edge: follows[edge] for edge in edges if edge not in closing}
    return kept
