"""`compact docs` prints the guides as they are."""

from pathlib import Path

import pytest

from compact.commands.cli import main
from helpers.commands import fails

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_is_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    wanted = [p.stem for p in DOCS.glob("*.md")] + [
        f"results/{p.stem}" for p in DOCS.glob("results/*.md")
    ]
    assert sorted(names) == sorted(wanted)
    assert (
        "method   " in lines[names.index("method")]
        and "How teachers are weighted" in lines[names.index("method")]
    )
    assert main(["docs", "results/labelled.md"]) == 0
    assert capsys.readouterr().out == (DOCS / "results/labelled.md").read_text()


def test_an_unknown_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'methods'" in fails(capsys, "docs", "methods")
