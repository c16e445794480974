"""Writes the report: one self-contained HTML page that needs no network."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from compact.report.charts import look
from compact.report.curves import (
    learning_charts,
    method_charts,
    method_rows,
    score_charts,
    weight_charts,
)
from compact.report.run import Run
from compact.report.views import (
    arm_view,
    facts,
    forgetting_rows,
    layer_charts,
    problem_view,
    teacher_table,
    tiles,
)


def render(run: Run) -> str:
    """Returns the HTML of the page."""
    teachers = [*run.teachers, *(r.teacher for p in run.explained for r in p.rationales)]
    colours = {name: i for i, name in enumerate(dict.fromkeys(teachers))}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_turns,
    )
    environment.filters |= {"tint": tint, "look": look}
    return environment.get_template("page.html.j2").render(
        title=run.folder.resolve().name,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        tiles=tiles(run),
        facts=facts(run),
        notes=run.notes,
        colours=colours,
        teachers=teacher_table(run) if run.scores else [],
        weights=weight_charts(run) if run.scores else [],
        scores=score_charts(run) if run.scores else [],
        learning=learning_charts(run),
        method=method_rows(run),
        method_charts=method_charts(run),
        forgetting=forgetting_rows(run),
        layers=layer_charts(run),
        arms=arm_view(run),
        problems=[problem_view(run, p, colours) for p in run.explained],
    )


# Characters that turn the direction of the text behind them, also of the page's own.
_TURNS = dict.fromkeys(
    [*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\N{REPLACEMENT CHARACTER}"
)


def _without_turns(value: Any) -> Any:
    """Returns text of data without characters that reverse other text; anything else as it is."""
    return value.translate(_TURNS) if type(value) is str else value


def tint(value: float) -> Markup:
    """Returns the HTML attributes of a token: green for a gain, red for a loss, none near 0."""
    strength = round(abs(value) * 70)
    if strength < 4:
        return Markup("")
    name = "gain" if value > 0 else "loss"
    return Markup(f' style="--t:{strength}%" class="{name}"')
