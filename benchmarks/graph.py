"""Consensus of P problems by step graphs: native code and rustworkx against loops and networkx.

P problems have K rationales of S steps with numbers and equations. Both ways take the steps as
arrays, match steps, join classes by edges, cut cycles, find the mainstream and score every
rationale. `networkx` is what a user would write without this project. It shares only the matching
of two rationales with compact/graphs/plain.py, so tests/graphs/test_step_graphs.py uses `loops` as
the specification of the graphs.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence

import networkx as nx
import numpy as np
import torch

from benchmarks.harness import Args, Outputs, Provider, Skipped
from compact.graphs.plain import PLACES, Step, chain, plain_steps
from compact.graphs.step_graphs import THRESHOLD, Steps, build_graphs, describe_steps
from compact.metrics.step_graph import MAINSTREAM_BONUS, consensus

TITLE = "The consensus graphs of many problems"
LEGEND = (
    "P problems of K rationales of S steps: match steps, form step classes, find the mainstream "
    "path, score every rationale."
)
SHAPES = ({"P": 1000, "K": 8, "S": 12}, {"P": 100, "K": 8, "S": 12})
DTYPES = ("float32",)


def texts(problems: int, rationales: int, steps: int, seed: int) -> list[list[list[str]]]:
    """Returns problems of rationales of steps that share most of their sums, some of them wrong."""
    rng = random.Random(seed)
    found = []
    for _ in range(problems):
        sums = [(rng.randint(2, 99), rng.randint(2, 99)) for _ in range(steps)]
        found.append(
            [
                [f"so {a} + {b} = {a + b + (rng.random() < 0.2)} in all" for a, b in sums]
                for _ in range(rationales)
            ]
        )
    return found


def classes_of(rationales: Sequence[Sequence[Step]]) -> dict[tuple[int, int], int]:
    """Returns the class of every step; the key of a step is (rationale, place)."""
    graph = nx.Graph()
    graph.add_nodes_from((r, i) for r, steps in enumerate(rationales) for i in range(len(steps)))

    def key(r: int) -> tuple[list[int], list[tuple[float, ...]]]:
        return [s.content for s in rationales[r]], [s.state for s in rationales[r]]

    for a, b in itertools.combinations(sorted(range(len(rationales)), key=key), 2):
        pairs = chain(rationales[a], rationales[b], THRESHOLD)
        graph.add_edges_from(((a, i), (b, j)) for i, j in pairs)
    return {s: name for name, part in enumerate(nx.connected_components(graph)) for s in part}


def class_graph(class_of: dict[tuple[int, int], int], sizes: Sequence[int]) -> nx.DiGraph:
    """Returns the classes joined by "is followed by", without cycles.

    Edges are added in the order of their rank: more common ones first, then those that go further
    forward. Edges of one rank that are on a cycle are left out together.
    """
    places: dict[int, list[int]] = {}
    for (r, i), name in class_of.items():
        place = i / (sizes[r] - 1) if sizes[r] > 1 else 1.0
        places.setdefault(name, []).append(round(place * PLACES))
    mean = {name: sum(found) / len(found) for name, found in places.items()}
    follows = Counter(
        pair
        for r, size in enumerate(sizes)
        for pair in {(class_of[r, i], class_of[r, i + 1]) for i in range(size - 1)}
        if pair[0] != pair[1]
    )

    def rank(edge: tuple[int, int]) -> tuple[float, ...]:
        a, b = edge
        return -follows[edge], mean[a] - mean[b], mean[a], mean[b]

    dag = nx.DiGraph()
    dag.add_nodes_from(mean)
    for _, group in itertools.groupby(sorted(follows, key=rank), key=rank):
        edges = list(group)
        dag.add_edges_from(edges)
        dag.remove_edges_from([(a, b) for a, b in edges if nx.has_path(dag, b, a)])
    return dag


def on_heaviest_path(dag: nx.DiGraph, members: dict[int, int]) -> set[int]:
    """Returns the classes on any path with the greatest sum of members."""
    order = list(nx.topological_sort(dag))
    upto: dict[int, int] = {}
    onwards: dict[int, int] = {}
    for node in order:
        upto[node] = members[node] + max((upto[p] for p in dag.predecessors(node)), default=0)
    for node in reversed(order):
        onwards[node] = members[node] + max((onwards[s] for s in dag.successors(node)), default=0)
    heaviest = max(upto.values())
    return {node for node in order if upto[node] + onwards[node] - members[node] == heaviest}


def loops(steps: Steps) -> np.ndarray:
    """Returns [R] the consensus of every rationale, by Python loops over dicts and graphs."""
    plain = plain_steps(steps.item_offsets, steps.items, steps.content, steps.state)
    starts = steps.step_offsets.tolist()
    found = []
    for first, end in itertools.pairwise(steps.problem_offsets.tolist()):
        rationales = [plain[starts[r] : starts[r + 1]] for r in range(first, end)]
        class_of = classes_of(rationales)
        teachers: dict[int, set[int]] = {}
        for (r, _), name in class_of.items():
            teachers.setdefault(name, set()).add(r)
        members = {name: len(some) for name, some in teachers.items()}
        sizes = [len(some) for some in rationales]
        mainstream = on_heaviest_path(class_graph(class_of, sizes), members)
        for r, size in enumerate(sizes):
            support = sum(members[class_of[r, i]] for i in range(size)) / size / len(sizes)
            found.append(support + MAINSTREAM_BONUS * (class_of[r, size - 1] in mainstream))
    return np.array(found)


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Native assembly with rustworkx, and the same graphs with networkx."""
    if args.device.type != "cpu":
        return {"compact": Skipped("graphs are built on the CPU")}
    problems, rationales, steps = (int(args.shape[key]) for key in ("P", "K", "S"))
    described = describe_steps(texts(problems, rationales, steps, args.seed), None)

    def compact() -> Outputs:
        return {"consensus": torch.from_numpy(consensus(described, build_graphs(described)))}

    def plain() -> Outputs:
        return {"consensus": torch.from_numpy(loops(described))}

    expected = functools.cache(plain)
    return {"compact": Provider(compact, expected), "networkx": Provider(plain, expected)}
