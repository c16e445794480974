"""The consensus graphs of P problems: native assembly and rustworkx against loops and networkx.

P problems of K rationales of S steps each hold numbers and equations; the graphs are built and the
mainstream path is found. The support of every step's class is compared.
"""

from __future__ import annotations

import functools
import itertools
import random

import networkx as nx
import numpy as np
import torch

from benchmarks.harness import Args, Outputs, Provider, Skipped
from compact.step_graphs import THRESHOLD, Steps, build_graphs, describe_steps

SHAPES = ({"P": 100, "K": 8, "S": 12},)


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


def similarity(one: frozenset[int], two: frozenset[int]) -> float:
    """1 for a shared equation (odd items), else the Jaccard index of the numbers (even items)."""
    if any(item % 2 for item in one & two):
        return 1.0
    numbers = {item for item in one | two if item % 2 == 0}
    return len({item for item in one & two if item % 2 == 0}) / len(numbers) if numbers else 0.0


def chain(one: list[frozenset[int]], two: list[frozenset[int]]) -> list[tuple[int, int]]:
    """Mutual best matches of two rationales, the order-preserving chain of greatest similarity."""
    table = [[similarity(a, b) for b in two] for a in one]
    total = [[0.0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            best = max(total[i][j + 1], total[i + 1][j])
            mutual = value == max(row) and value == max(r[j] for r in table)
            if value >= THRESHOLD and mutual:
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


def with_networkx(steps: Steps) -> np.ndarray:
    """Returns [S] support of every step's class, by Python loops over dictionaries and graphs."""
    bounds = steps.item_offsets.tolist()
    items = [frozenset(steps.items[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    support = np.zeros(len(items))
    for first, end in itertools.pairwise(steps.problem_offsets.tolist()):
        starts = steps.step_offsets.tolist()
        spans = {r: range(starts[r], starts[r + 1]) for r in range(first, end)}
        graph = nx.Graph()
        graph.add_nodes_from(itertools.chain(*spans.values()))
        order = sorted(spans, key=lambda r: steps.content[spans[r].start : spans[r].stop].tolist())
        for a, b in itertools.combinations(order, 2):
            pairs = chain([items[s] for s in spans[a]], [items[s] for s in spans[b]])
            graph.add_edges_from((spans[a][i], spans[b][j]) for i, j in pairs)
        owner = {step: r for r, span in spans.items() for step in span}
        class_of: dict[int, int] = {}
        share: list[float] = []
        for name, members in enumerate(nx.connected_components(graph)):
            class_of.update(dict.fromkeys(members, name))
            share.append(len({owner[step] for step in members}) / len(spans))
        follows: dict[tuple[int, int], int] = {}
        for span in spans.values():
            for pair in {(class_of[a], class_of[b]) for a, b in itertools.pairwise(span)}:
                follows[pair] = follows.get(pair, 0) + 1
        dag = nx.DiGraph()
        dag.add_nodes_from(range(len(share)))
        for (a, b), _ in sorted(follows.items(), key=lambda entry: -entry[1]):
            if a != b and not nx.has_path(dag, b, a):
                dag.add_edge(a, b, weight=share[b])
        nx.dag_longest_path(dag)
        for step, name in class_of.items():
            support[step] = share[name]
    return support


def providers(args: Args) -> dict[str, Provider | Skipped]:
    """Native assembly with rustworkx, and the same graphs with networkx."""
    if args.device.type != "cpu":
        return {"compact": Skipped("graphs are built on the CPU")}
    problems, rationales, steps = (int(args.shape[key]) for key in ("P", "K", "S"))
    described = describe_steps(texts(problems, rationales, steps, args.seed), None)

    def compact() -> Outputs:
        graphs = build_graphs(described)
        return {"support": torch.from_numpy(graphs.support[graphs.step_class])}

    def loops() -> Outputs:
        return {"support": torch.from_numpy(with_networkx(described))}

    expected = functools.cache(loops)
    return {"compact": Provider(compact, expected), "networkx": Provider(loops, expected)}
