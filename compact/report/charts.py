"""Draws the charts of the report as inline SVG, coloured by the page's style sheet.

Every chart has a viewBox of `WIDTH` units and scales with the page; text is 12 units high. A series
has the classes of `look`; the style sheet gives them colours for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH = 440.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 38.0
COLOURS = 8
LEAST_PITCH = 28.0
"""Least distance of two nodes of a graph that have labels."""


@dataclass(frozen=True)
class Series:
    """One series of a chart: a name, the number of its colour, and points (x, y) in order of x."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    kind: str = "line"  # "line", "faint" (thin, behind the others) or "dots"


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart: a value with an interval around it.

    Attributes:
        name: name of the row.
        colour: number of its colour.
        value: position of the mark.
        low, high: ends of the thin line.
        inner: ends of the box, or None for no box.
        points: the single values behind `value`, drawn as rings.
    """

    name: str
    colour: int
    value: float
    low: float
    high: float
    inner: tuple[float, float] | None = None
    points: Sequence[float] = ()


def look(number: int) -> str:
    """Returns the classes of a number: its colour, and a dash where the colours are used up."""
    dash = number // COLOURS
    return f"c{number % COLOURS}" + (f" dash{min(dash, 2)}" if dash else "")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers (1, 2, 2.5 or 5 times a power of ten) in [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1.0, 2.0, 2.5, 5.0, 10.0) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Writes the numbers of an axis, so that no two are alike: 0.25, 40, 1.2k, 3M.

    Args:
        values: as `ticks` returns them, evenly spaced.
    """
    largest = max(map(abs, values))
    scale, unit = next(((s, u) for s, u in ((1e6, "M"), (1e3, "k")) if largest >= 10 * s), (1, ""))
    step = (values[1] - values[0] if len(values) > 1 else largest) / scale
    if unit == "" and 0 < largest < 1e-3:
        return [f"{value:.4g}" for value in values]
    places = range(10)
    decimals = next((n for n in places if abs(step - round(step, n)) < 1e-6 * step), len(places))
    return [f"{x / scale:.{decimals}f}{unit}" if abs(x) > 1e-9 * largest else "0" for x in values]


_LEAST_SPAN = 1e-6
"""Least part of the values that an axis spans: below it, they differ by rounding."""


def _range(
    values: Sequence[float], given: tuple[float | None, float | None] = (None, None)
) -> tuple[float, float]:
    """Returns the ends of an axis: those given, else of the values with a margin; never empty."""
    low, high = min(values), max(values)
    least = _LEAST_SPAN * max(abs(low), abs(high))
    room = max(abs(low) * 0.1, 0.5)
    pad = (high - low) * 0.06 if high - low > least else room
    low = low - pad if given[0] is None else given[0]
    high = high + pad if given[1] is None else given[1]
    if high - low <= least:
        low, high = (low, low + room) if given[1] is None else (high - room, high)
    return low, high


def _svg(height: float, title: str, body: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(body)}</svg>'
    )


def _x_axis(low: float, high: float, height: float, label: str, left: float) -> list[str]:
    """Returns the SVG of vertical grid lines, the numbers below them and the axis label."""
    base = height - BOTTOM
    parts = []
    shown = ticks(low, high)
    for tick, text in zip(shown, labels(shown), strict=True):
        x = left + (tick - low) / (high - low) * (WIDTH - RIGHT - left)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" y2="{base:g}"/>'
            f'<text class="tick" x="{x:.1f}" y="{base + 15:g}" text-anchor="middle">{text}</text>'
        )
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:g}" y="{height - 6:g}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return parts


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    reference: tuple[float, str] | None = None,
    height: float = 240.0,
) -> Markup:
    """Draws series over a common x axis.

    Args:
        title: text for screen readers.
        series: the series; at least one has a point.
        x_label: text below the axis.
        y_range: limits of y; None takes a limit from the data.
        reference: y of a dashed horizontal line, and its name.
        height: height of the viewBox.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([reference[0]] if reference else [])
    x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    y_low, y_high = _range(ys, y_range)
    base = height - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            base - (y - y_low) / (y_high - y_low) * (base - TOP),
        )

    body = _x_axis(x_low, x_high, height, x_label, LEFT)
    shown = ticks(y_low, y_high, 4)
    for tick, text in zip(shown, labels(shown), strict=True):
        y = at(x_low, tick)[1]
        body.append(
            f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    if reference:
        y = at(x_low, reference[0])[1]
        body.append(
            f'<line class="reference" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><text class="note" x="{WIDTH - RIGHT:g}" y="{y - 4:.1f}" '
            f'text-anchor="end">{escape(reference[1])}</text>'
        )
    for s in series:
        points = [at(x, min(max(y, y_low), y_high)) for x, y in s.points]
        name, hue = f"<title>{escape(s.name)}</title>", look(s.colour)
        if s.kind == "dots" or len(points) == 1:
            body += [
                f'<circle class="dot {hue}" cx="{x:.1f}" cy="{y:.1f}" r="4">{name}</circle>'
                for x, y in points
            ]
        elif points:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            body.append(f'<polyline class="{s.kind} {hue}" points="{path}">{name}</polyline>')
    return _svg(height, title, body)


def interval_chart(
    title: str,
    rows: Sequence[Interval],
    *,
    x_label: str,
    x_range: tuple[float | None, float | None] = (None, None),
    reference: float | None = None,
) -> Markup:
    """Draws each row as a mark, a line from low to high, an inner box, and rings for the points.

    Args:
        title: text for screen readers.
        rows: at least one.
        x_label: text below the axis.
        x_range: limits of x; None takes a limit from the rows.
        reference: x of a dashed vertical line.
    """
    values = [v for r in rows for v in (r.low, r.high, *r.points)]
    low, high = _range(values + ([] if reference is None else [reference]), x_range)
    longest = max(len(r.name) for r in rows)
    left = min(150.0, max(60.0, 7.0 * longest + 14))
    fits = int((left - 14) / 6.6)
    height = TOP + 28.0 * len(rows) + BOTTOM

    def at(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - RIGHT - left)

    body = _x_axis(low, high, height, x_label, left)
    if reference is not None:
        x = at(reference)
        body.append(
            f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" '
            f'y2="{height - BOTTOM:g}"/>'
        )
    for i, row in enumerate(rows):
        y = TOP + 28.0 * i + 14
        shown = row.name if len(row.name) <= fits else row.name[: fits - 1] + "…"
        told = f"{row.name}: {row.value:.3g} ({row.low:.3g} to {row.high:.3g})"
        body.append(
            f'<g class="{look(row.colour)}"><title>{escape(told)}</title>'
            f'<text class="name" x="{left - 8:g}" y="{y + 4:g}" text-anchor="end">'
            f"{escape(shown)}</text>"
            f'<line class="whisker" x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" '
            f'y1="{y:g}" y2="{y:g}"/>'
        )
        if row.inner:
            a, b = at(row.inner[0]), at(row.inner[1])
            body.append(
                f'<rect class="box" x="{a:.1f}" y="{y - 7:g}" width="{max(1.0, b - a):.1f}" '
                'height="14" rx="3"/>'
            )
        body += [f'<circle class="point" cx="{at(v):.1f}" cy="{y:g}" r="3"/>' for v in row.points]
        body.append(f'<circle class="mark" cx="{at(row.value):.1f}" cy="{y:g}" r="4.5"/></g>')
    return _svg(height, title, body)


@dataclass(frozen=True)
class Node:
    """A step in the drawing of a consensus graph.

    Attributes:
        row: the rationale.
        column: the step within it.
        support: share of the rationales that have a step in this step's class, in (0, 1].
        mainstream: whether the class lies on the mainstream path.
        label: short text below the node.
        text: the whole step, shown on hover.
        epiphany: whether the step is an epiphany step.
    """

    row: int
    column: int
    support: float
    mainstream: bool
    label: str
    text: str
    epiphany: bool


def consensus_chart(
    title: str,
    teachers: Sequence[tuple[str, int]],
    nodes: Sequence[Node],
    matches: Sequence[tuple[int, int]],
) -> Markup:
    """Draws the steps of each teacher as a chain, and lines between steps that match.

    Args:
        title: text for screen readers.
        teachers: (name, colour) of each row.
        nodes: the steps.
        matches: pairs of indices into `nodes`.
    """
    columns = max(n.column for n in nodes) + 1
    left, gap = 28.0, 74.0
    height = 22.0 + gap * len(teachers)
    # With many steps, the nodes come closer and get smaller; where labels have no room, each step
    # is still read by pointing at it.
    pitch = min(96.0, (WIDTH - left - 54) / max(1, columns - 1))
    size = min(1.0, 0.42 * pitch / 11.0)

    def at(node: Node) -> tuple[float, float]:
        return left + 20 + node.column * pitch, 44.0 + gap * node.row

    body = []
    for row, (name, colour) in enumerate(teachers):
        chain = sorted((n for n in nodes if n.row == row), key=lambda n: n.column)
        y = 44.0 + gap * row
        hue = look(colour)
        body.append(f'<text class="name {hue}" x="4" y="{y - 24:g}">{escape(name)}</text>')
        if chain:
            a, b = at(chain[0])[0], at(chain[-1])[0]
            body.append(
                f'<line class="chain {hue}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:g}" y2="{y:g}"/>'
            )
    for i, j in matches:
        (x1, y1), (x2, y2) = at(nodes[i]), at(nodes[j])
        main = " main" if nodes[i].mainstream and nodes[j].mainstream else ""
        # Bend the line to one side, so that it does not cross the nodes of the rows in between.
        bend = 0.0 if abs(nodes[i].row - nodes[j].row) == 1 else 16.0
        body.append(
            f'<path class="match{main}" d="M{x1:.1f},{y1:g} Q{(x1 + x2) / 2 + bend:.1f},'
            f'{(y1 + y2) / 2:.1f} {x2:.1f},{y2:g}"/>'
        )
    fits = int(pitch / 6.4) if columns > 1 else 30
    for node in nodes:
        x, y = at(node)
        colour = teachers[node.row][1]
        main = " main" if node.mainstream else ""
        label = ""
        if pitch >= LEAST_PITCH:
            short = node.label if len(node.label) <= fits else node.label[: fits - 1] + "…"
            label = f'<text class="step" x="{x:.1f}" y="{y + 24:g}">{escape(short)}</text>'
        star = f'<text class="star" x="{x:.1f}" y="{y - 12:g}">★</text>' if node.epiphany else ""
        body.append(
            f'<g class="node{main} {look(colour)}"><title>{escape(node.text)} '
            f"(support {node.support:.2f})</title>"
            f'<circle cx="{x:.1f}" cy="{y:g}" r="{size * (5 + 6 * node.support):.1f}"/>{star}'
            f"{label}</g>"
        )
    return _svg(height, title, body)
