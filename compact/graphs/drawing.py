"""Draws the consensus graph of a problem as a picture."""

from __future__ import annotations

import textwrap
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import rustworkx as rx

from compact.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
MOST_NODES = 2000
"""Most nodes of a graph that is drawn: a picture of more shows nothing."""


def picture_of(figure: Figure, format: str, *, tidy: bool = False) -> bytes:
    """Returns a figure as the bytes of a picture; names from data are plain text, not formulas.

    Args:
        figure: the figure.
        format: one of `FORMATS`.
        tidy: whether to lay out the axes so that no text overlaps.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    content = BytesIO()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
    if tidy:
        figure.tight_layout()
    with rc_context({"text.usetex": False}):
        figure.savefig(content, format=format, bbox_inches="tight")
    return content.getvalue()


def draw_graph(graph: rx.PyDiGraph, path: Path) -> None:
    """Draws a class graph as a picture; the suffix of `path` sets the format, one of `FORMATS`.

    Steps run from top to bottom. A circle's size shows the support of the class. It is green on the
    mainstream path and red where the arithmetic fails. The number at an edge counts the rationales
    that take it.

    Raises:
        ValueError: the format is unknown, or the graph has more than `MOST_NODES` nodes.
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from rustworkx.visualization import mpl_draw

    format = path.suffix.lower().removeprefix(".")
    if format not in FORMATS:
        raise ValueError(f"{path}: expected the suffix .{', .'.join(FORMATS)}, got {path.suffix!r}")
    if len(graph) > MOST_NODES:
        raise ValueError(
            f"{path}: the graph has {len(graph)} nodes, at most {MOST_NODES} can be drawn"
        )
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
    write_whole(path, picture_of(figure, format), kind="picture of a graph")


def _colour(node: dict[str, str]) -> str:
    if node["arithmetic"] == "fails":
        return "#e57373"
    return "#81c784" if node["mainstream"] == "true" else "#cfd8dc"
