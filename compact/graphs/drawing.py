"""Draws the consensus graph of a problem as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path

import rustworkx as rx


def draw_graph(graph: rx.PyDiGraph, path: Path) -> None:
    """Draws a class graph as a picture; the suffix of `path` sets the format.

    Steps run from top to bottom. A circle's size shows the support of the class. It is green on the
    mainstream path and red where the arithmetic fails. The number at an edge counts the rationales
    that take it.

    Raises:
        ValueError: if the format is unknown.
        OSError: if the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from rustworkx.visualization import mpl_draw

    layers = rx.layers(graph, [n for n in graph.node_indices() if graph.in_degree(n) == 0], True)
    position = {
        int(node): ((j + 0.5) / len(layer), -float(depth))
        for depth, layer in enumerate(layers)
        for j, node in enumerate(layer)
    }
    figure = Figure(figsize=(3.5 + 2.5 * max(map(len, layers)), 1 + 1.3 * len(layers)), dpi=110)
    axes = figure.subplots()
    mpl_draw(
        graph,
        pos=position,
        ax=axes,
        node_color=[_colour(node) for node in graph.nodes()],
        node_size=[round(300 + 1500 * float(n["support"])) for n in graph.nodes()],
        with_labels=True,
        labels=lambda n: f"{textwrap.shorten(n['text'], 42, placeholder=' …')}\n{n['teachers']}",
        edge_labels=lambda edge: edge["count"],
        font_size=7,
        arrows=True,
    )
    axes.margins(0.15)
    axes.set_title("green: mainstream; red: arithmetic fails; size: support", fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def _colour(node: dict[str, str]) -> str:
    if node["arithmetic"] == "fails":
        return "#e57373"
    return "#81c784" if node["mainstream"] == "true" else "#cfd8dc"
