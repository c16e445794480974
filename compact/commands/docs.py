"""`compact docs`: prints the guides that are installed with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from compact.files import shipped
from compact.registry import unknown

EPILOG = """example:
  compact docs
  compact docs method | less
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `compact docs`."""
    parser.add_argument("page", nargs="?", metavar="PAGE", help="none: list the pages")


def run(args: argparse.Namespace) -> int:
    """Prints a page, or the list of pages; returns the exit status."""
    pages = _pages()
    if args.page is None:
        width = max(map(len, pages))
        for name, path in pages.items():
            title = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
            print(f"{name:<{width}}  {title}")
        return 0
    name = args.page.removesuffix(".md")
    if name not in pages:
        raise ValueError(unknown("page", name, list(pages)))
    print(pages[name].read_text(encoding="utf-8"), end="")
    return 0


def _pages() -> dict[str, Path]:
    """Returns name -> file."""
    folder = shipped("docs")
    found = {path.stem: path for path in sorted(folder.glob("*.md"))}
    return found | {f"results/{p.stem}": p for p in sorted(folder.glob("results/*.md"))}
