"""Builds the consensus graphs of problems, analyses them with rustworkx, and saves them.

A node is a reasoning step. A match edge joins steps of different rationales that say the same. The
connected components are step classes. An edge between two classes means "is followed by". The
mainstream path is the path of classes with the greatest total support. C++ code (csrc/graph)
matches the steps and builds the edges; with the reference backend, `compact.graphs.plain` does.

`compact score DATA ... --graphs FOLDER` saves the graph of every problem, `compact graph FILE --out
PICTURE` draws one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rustworkx as rx

from compact.files import check_shape, parse_json, read_text, replace_whole
from compact.text.equations import equations, equations_of_steps, numbers
from compact_ops import backend

if TYPE_CHECKING or backend() == "native":
    from compact.graphs import _graph as assembly
else:
    from compact.graphs import plain as assembly

THRESHOLD = 0.8
"""Two steps match if their similarity is at least this."""
_NODE_KEYS = ("text", "teachers", "support", "arithmetic", "mainstream")
_GRAPH = {
    "directed": bool,
    "nodes": [{"id": int, "data": dict.fromkeys(_NODE_KEYS, str)}],
    "links": [{"source": int, "target": int, "data": {"count": str}}],
}


class Steps(NamedTuple):
    """The steps of P problems, R rationales, S steps as arrays; see csrc/graph/graph.h.

    Attributes:
        problem_offsets: [P + 1] int64, rationales of each problem.
        step_offsets: [R + 1] int64, steps of each rationale.
        item_offsets: [S + 1] int64, items of each step.
        items: [I] int64, sorted within each step: 2 n for number n, 2 e + 1 for equation e.
        content: [S] int64 rank of the step's text among all texts.
        state: [S, H] float32 unit vectors; H = 0 to match steps without mathematics by their text.
    """

    problem_offsets: np.ndarray
    step_offsets: np.ndarray
    item_offsets: np.ndarray
    items: np.ndarray
    content: np.ndarray
    state: np.ndarray


@dataclass(frozen=True)
class Graphs:
    """The graphs of P problems with C classes, D edges and E matches in all.

    Attributes:
        matches: [E, 2] steps that match.
        step_class: [S] class of each step, numbered over the whole batch.
        class_offsets: [P + 1] classes of each problem.
        support: [C] share of the problem's rationales that have a step in the class.
        edge_offsets: [P + 1] edges of each problem.
        edges: [D, 2] classes; the second follows the first. There are no cycles.
        edge_count: [D] rationales in which the second class follows the first.
        mainstream: [C] bool, whether the class is on the path of greatest total support.
    """

    matches: np.ndarray
    step_class: np.ndarray
    class_offsets: np.ndarray
    support: np.ndarray
    edge_offsets: np.ndarray
    edges: np.ndarray
    edge_count: np.ndarray
    mainstream: np.ndarray


def describe_steps(problems: Sequence[Sequence[Sequence[str]]], state: np.ndarray | None) -> Steps:
    """Turns the texts of steps into arrays.

    Args:
        problems: for each problem, for each rationale, the texts of its steps.
        state: [S, H] float32 mean hidden states of the steps, of any length, or None.

    Raises:
        ValueError: if a state is not finite.
    """
    rationales = [rationale for problem in problems for rationale in problem]
    texts = [text for rationale in rationales for text in rationale]
    ids: dict[str, int] = {}
    rank = {text: i for i, text in enumerate(sorted(set(texts)))}
    items = [
        sorted(
            [2 * ids.setdefault(number, len(ids)) for number in numbers(text)]
            + [2 * ids.setdefault(e.key, len(ids)) + 1 for e in equations(text)]
        )
        for text in texts
    ]
    if state is None:
        unit = np.zeros((len(texts), 0), np.float32)
    else:
        if not np.isfinite(state).all():
            raise ValueError("step-graph: hidden states must be finite")
        length = np.linalg.norm(state, axis=1, keepdims=True)
        unit = (state / np.maximum(length, 1e-12)).astype(np.float32)
    return Steps(
        _offsets([len(problem) for problem in problems]),
        _offsets([len(rationale) for rationale in rationales]),
        _offsets([len(item) for item in items]),
        np.array([i for item in items for i in item], np.int64),
        np.array([rank[text] for text in texts], np.int64),
        unit,
    )


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def build_graphs(steps: Steps, threshold: float = THRESHOLD) -> Graphs:
    """Returns the graphs of all problems."""
    raw = assembly.assemble(*steps, threshold)
    class_offsets, edge_offsets, edges = raw["class_offsets"], raw["edge_offsets"], raw["edges"]
    sizes = np.repeat(np.diff(steps.problem_offsets), np.diff(class_offsets))
    members = raw["class_members"]
    mainstream = np.zeros(len(members), bool)
    for problem in range(len(class_offsets) - 1):
        first, end = class_offsets[problem], class_offsets[problem + 1]
        mine = edges[edge_offsets[problem] : edge_offsets[problem + 1]]
        mainstream[first:end] = _on_heaviest_path(members[first:end], mine - first)
    return Graphs(
        matches=raw["matches"],
        step_class=raw["step_class"],
        class_offsets=class_offsets,
        support=members / sizes,
        edge_offsets=edge_offsets,
        edges=edges,
        edge_count=raw["edge_count"],
        mainstream=mainstream,
    )


def _on_heaviest_path(value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Returns [n] bool: whether a node is on a path with the greatest sum of `value`.

    If several paths have that sum, the nodes of all of them are True, so the result does not depend
    on the order of the nodes.

    Args:
        value: [n] int, the value of each node.
        edges: [d, 2] pairs of nodes.
    """
    upto, onwards = (_heaviest_to(value, *ends) for ends in (edges.T, edges.T[::-1]))
    total = upto + onwards - value
    heaviest: np.ndarray = total == total.max(initial=0)
    return heaviest


def _heaviest_to(value: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns [n]: for each node, the greatest sum of `value` over a path that ends in it.

    The sum includes the node itself. It is minus the length of the shortest path in rustworkx from
    an extra source node that has an edge to every node; the length of an edge is minus the value of
    its target.
    """
    front = len(value)
    length = -value
    graph = rx.PyDiGraph(check_cycle=False, multigraph=True)
    graph.add_nodes_from(range(front + 1))
    start = zip([front] * front, range(front), length.tolist(), strict=True)
    follow = zip(source.tolist(), target.tolist(), length[target].tolist(), strict=True)
    graph.add_edges_from([*start, *follow])
    found = rx.digraph_bellman_ford_shortest_path_lengths(graph, front, float)
    return -np.array([found[node] for node in range(front)])


def as_rustworkx(
    graphs: Graphs, problem: int, texts: Sequence[Sequence[str]], names: Sequence[str]
) -> rx.PyDiGraph:
    """Returns the class graph of one problem.

    Args:
        graphs: the graphs of a batch.
        problem: index of the problem in the batch.
        texts: the steps of every rationale of that problem.
        names: the teacher of every rationale.

    Returns:
        A graph. Its nodes hold text (of the first step of the class), teachers, support, arithmetic
        ("holds", "fails" or "none") and mainstream. Its edges hold count.
    """
    first, end = (int(i) for i in graphs.class_offsets[problem : problem + 2])
    nodes: list[dict[str, str]] = [{} for _ in range(end - first)]
    start = int(np.searchsorted(graphs.step_class, first))
    mine = iter(graphs.step_class[start:])
    for name, rationale in zip(names, texts, strict=True):
        for text, of_step in zip(rationale, equations_of_steps(rationale), strict=True):
            node = nodes[int(next(mine)) - first]
            node.setdefault("text", text)
            teachers = [*node["teachers"].split(", ")] if "teachers" in node else []
            node["teachers"] = ", ".join(dict.fromkeys([*teachers, name]))
            checks = [equation.holds for equation in of_step]
            found = "none" if not checks else "holds" if all(checks) else "fails"
            if node.get("arithmetic", "none") == "none" or found == "fails":
                node["arithmetic"] = found
    for i, node in enumerate(nodes):
        node["support"] = f"{graphs.support[first + i]:.3f}"
        node["mainstream"] = str(bool(graphs.mainstream[first + i])).lower()
    graph = rx.PyDiGraph()
    graph.add_nodes_from(nodes)
    chosen = slice(*graphs.edge_offsets[problem : problem + 2])
    pairs = (graphs.edges[chosen] - first).tolist()
    graph.add_edges_from(
        [
            (a, b, {"count": str(n)})
            for (a, b), n in zip(pairs, graphs.edge_count[chosen], strict=True)
        ]
    )
    return graph


def save_graph(graph: rx.PyDiGraph, path: Path) -> None:
    """Writes a class graph as node-link JSON; it replaces only another saved graph.

    Raises:
        ValueError: the file at `path` is none.
        OSError: it cannot be written.
    """
    if path.exists():
        load_graph(path)
    text = rx.node_link_json(graph, node_attrs=lambda node: node, edge_attrs=lambda edge: edge)
    replace_whole(path, str(text))


def load_graph(path: Path) -> rx.PyDiGraph:
    """Reads a graph that `save_graph` wrote.

    Raises:
        ValueError: if the file holds no such graph.
        OSError: if the file cannot be read.
    """
    try:
        text = read_text(path)
        value = parse_json(text, str(path))
        check_shape(value, _GRAPH, str(path))
        known = [node["id"] for node in value["nodes"]]
        ends = {link[end] for link in value["links"] for end in ("source", "target")}
        # rustworkx panics over the first.
        if not ends <= set(known) or len(set(known)) < len(known):
            raise ValueError("a link must join nodes, each with an id of its own")
        graph = rx.parse_node_link_json(text, node_attrs=dict, edge_attrs=dict)
        if not isinstance(graph, rx.PyDiGraph):
            raise ValueError("its edges have no direction")
        for node in graph.nodes():
            if not 0.0 < float(node["support"]) <= 1.0:
                raise ValueError(f"support must be above 0 and at most 1, got {node['support']!r}")
        for count in graph.edges():
            if not 1 <= int(count["count"]) <= 10**9:
                raise ValueError(f"count must be at least 1, got {count['count']!r}")
        if not len(graph) or not rx.is_directed_acyclic_graph(graph):
            raise ValueError("it has no node, or a cycle")
    except (ValueError, rx.JSONDeserializationError, KeyError, TypeError, IndexError) as error:
        what = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: expected a saved graph (node-link JSON): {what}") from None
    return graph
