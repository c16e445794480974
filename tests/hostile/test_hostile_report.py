"""One hostile record through every view of the report, and through the pictures."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from compact.evaluation import compare
from compact.evaluation.bench import pages
from compact.graphs.drawing import draw_graph, picture_of
from compact.graphs.step_graphs import as_rustworkx, build_graphs, describe_steps
from compact.report.explain import ExplainedProblem, ExplainedRationale, ExplainedStep, Token
from compact.report.page import render
from compact.report.run import Run
from compact.trainer.runlog import SCHEMA

HOSTILE = {
    "image": "<img src=x onerror=alert(1)>",
    "script": "</script><script>alert(1)</script>",
    "attribute": '" onload="alert(1)" x=\'',
    "svg": "</title></svg><svg onload=alert(1)>",
    "style": "</style><style>*{display:none}",
    "comment": "--><b onclick=alert(1)>",
    "entity": "&lt;img src=x onerror=alert(1)&gt;&#60;img&#62;",
    "template": "{{ 7*7 }}{% for x in y %}<iframe>",
    "link": "<a href='javascript:alert(1)'>x</a>",
    "mathtext": r"$\frac{1}{$ \$x_{ ^ $$",
    "control": "a\u0001\u202eb\u2028c\ud7ff",
    "long": "<b>" * 3000,
}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "p", "h1", "dl", "div", "dt"),
    *("dd", "nav", "a", "details", "summary", "main", "section", "h2", "span", "i", "figure"),
    *("figcaption", "b", "svg", "line", "text", "polyline", "circle", "rect", "g", "table"),
    *("thead", "tbody", "tr", "th", "td", "article", "h3", "header", "footer", "code", "path"),
}


class Tags(HTMLParser):
    """Collects the tags and the attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.links |= {str(value) for name, value in attrs if name in ("href", "src")}


def tags_of(page: str) -> Tags:
    found = Tags()
    found.feed(page)
    return found


def run_of(folder: Path, text: str) -> Run:
    """A run with one text wherever the page shows text of data or of files."""
    scores = {name: np.full(4, 0.5) for name in SCHEMA.names}
    scores |= {
        "step": np.array([1, 1, 2, 2]),
        "question_id": np.array([text] * 4, object),
        "teacher": np.array([text, "b", text, "b"], object),
    }
    step = ExplainedStep(text, -1.0, 0.5, True, 0.5, True)
    rationales = tuple(
        ExplainedRationale(name, text, (Token(text, 0.5, 0), Token(text, -0.5, -1)), (step, step))
        for name in (text, "b")
    )
    arm = {"name": text, "seeds": [0, 1], "values": [0.5, 0.6], "mean": 0.5, "ci_low": 0.4}
    arm |= {"ci_high": 0.6, "right_weight": 0.5, "right_weight_low": 0.4, "right_weight_high": 0.6}
    arm |= {"weights": {text: 0.5}, "tokens": 1, "steps": 1, "gain": 0.1, "gain_low": 0.0}
    task = dict.fromkeys(
        ("base_accuracy", "student_accuracy", "drop", "drop_low", "drop_high"), 0.5
    )
    drift = {"data": text, "base_perplexity": 1.0, "student_perplexity": 1.0, "kl": 0.0}
    summary = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "correct": 1, "items": 2}
    summary["forgetting"] = {"tasks": {text: task}, "text": drift, "answers": drift}
    summary["forgetting"]["layers"] = {"moved": [0.1], "states": {"text": [1.0], text: [1.0]}}
    info = dict.fromkeys(("student", "data", "weigher", "layout", "started", "status"), text)
    info |= {"command": text, "settings": {"seed": text}, "versions": {text: text}}
    return Run(
        folder,
        info=info,
        scores=scores,
        logs=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "eval_loss": 0.7}],
        evaluations=[(text, summary)],
        arms={"arms": [arm | {"gain_high": 0.2}], "metric": text, "data": text, "command": text}
        | {"token_budget": 1, "settings": {text: text}},
        explained=[ExplainedProblem(text, text, text, -2.0, rationales, ((0, 2),))],
        notes=[text],
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_has_the_tags_of_a_harmless_one(tmp_path: Path, name: str) -> None:
    """Text of data makes no tag, no attribute and no link, wherever it stands."""
    folder = tmp_path / "run"
    plain = tags_of(render(run_of(folder, "harmless")))
    found = tags_of(render(run_of(folder, HOSTILE[name])))
    assert found.tags == plain.tags and set(found.tags) <= TAGS
    assert found.attributes == plain.attributes and found.links == plain.links
    assert not any(a.startswith("on") for a in found.attributes)


def test_text_of_data_does_not_turn_the_text_of_the_page(tmp_path: Path) -> None:
    page = render(run_of(tmp_path / "run", "a\u202eb\u2066c"))
    lines = [line for line in page.splitlines() if "<svg" not in line]
    assert "a\ufffdb\ufffdc" in page and not any("\u202e" in line for line in lines)


@pytest.mark.parametrize("name", HOSTILE)
def test_pictures(tmp_path: Path, name: str) -> None:
    """Names with formulas, brackets and control characters are drawn as they are."""
    text = HOSTILE[name][:300]
    steps = [[[f"{text} 1 + 1 = 2", "2 + 2 = 4"], ["1 + 1 = 2", f"{text} = 4"]]]
    graph = as_rustworkx(build_graphs(describe_steps(steps, None)), 0, steps[0], [text, "b"])
    for suffix in ("svg", "png", "pdf") if name == "mathtext" else ("svg",):
        path = tmp_path / f"graph.{suffix}"
        draw_graph(graph, path)
        assert path.stat().st_size > 1000
    assert "<img" not in (tmp_path / "graph.svg").read_text(encoding="utf-8")
    arm = {"name": text, "mean": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    arm |= {"right_weight": 0.5, "right_weight_low": 0.4, "right_weight_high": 0.6}
    assert picture_of(compare.draw([arm], text), "svg", tidy=True)
    assert picture_of(pages.draw({text: [0.5]}, [text]), "svg", tidy=True)


@pytest.mark.parametrize("suffix", ["", ".jpg", ".PNGX", ".exe"])
def test_a_picture_of_unknown_format(tmp_path: Path, suffix: str) -> None:
    graph = as_rustworkx(build_graphs(describe_steps([[["a"]]], None)), 0, [["a"]], ["t"])
    with pytest.raises(ValueError, match="expected the suffix .png, .svg, .pdf"):
        draw_graph(graph, tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())
