"""Writes README, guides and API reference as one HTML site: `python docs/build.py [FOLDER]`.

pdoc renders the docstrings; the Markdown files become pages in the same style. The build fails if
pdoc cannot read a docstring or if the target of a link does not exist.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parents[1]
PACKAGES = ("compact", "compact_ops")
# In the order of the navigation; the README is the front page.
GUIDES = ("quickstart", "collect", "choosing", "data-format", "trainer", "method", "metrics")
GUIDES += ("strategies", "extending", "operators", "auditing", "evaluation", "distributed")
GUIDES += ("performance", "leaks")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def pages() -> dict[Path, str]:
    """Returns the Markdown files of the site, each with the path of its page."""
    found = {ROOT / "README.md": "index.html"}
    found |= {ROOT / "docs" / f"{name}.md": f"{name}.html" for name in GUIDES}
    results = sorted((ROOT / "docs/results").glob("*.md"))
    return found | {path: f"results/{path.stem}.html" for path in results}


def relink(text: str, source: Path, site: Path, places: dict[Path, str]) -> str:
    """Rewrites the links of a page: to other pages, or to copies of files that are not pages.

    Raises:
        ValueError: the target of a link does not exist.
    """
    here = (site / places[source]).parent

    def target(match: re.Match[str]) -> str:
        before, link, part, after = match[1], match[2], match[3] or "", match[4]
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        path = (source.parent / link).resolve()
        if not path.is_file():
            raise ValueError(f"{source.relative_to(ROOT)}: the link {link!r} has no target file")
        place = site / places.get(path, f"files/{path.relative_to(ROOT)}")
        if path not in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        return f"{before}{os.path.relpath(place, here)}{part}{after}"

    return _LINK.sub(target, text)


def hide_tuple_plumbing() -> None:
    """Hides the generated docstrings of named tuples ("Alias for field number 0") from pdoc.

    The docstring of the class describes the fields. The annotations of the constructor are strings
    that pdoc cannot resolve.
    """
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, tuple) and hasattr(cls, "_fields"):
                cls.__new__.__doc__ = "@private"
                for name in cls._fields:
                    getattr(cls, name).__doc__ = ""


def build(site: Path) -> None:
    """Writes the site.

    Raises:
        ValueError: the target of a link does not exist.
        Warning: pdoc cannot read a docstring or annotation.
    """
    shutil.rmtree(site, ignore_errors=True)
    places = pages()
    guides = {places[ROOT / "docs" / f"{name}.md"]: title(name) for name in GUIDES}
    template = ROOT / "docs/template"
    pdoc.render.configure(
        docformat="google", include_undocumented=False, template_directory=template
    )
    pdoc.render.env.globals["guides"] = guides
    hide_tuple_plumbing()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*PACKAGES, output_directory=site)
    page = pdoc.render.env.get_template("guide.html.jinja2")
    for source, place in places.items():
        text = source.read_text(encoding="utf-8")
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        html = page.render(
            heading=heading[1] if heading else source.stem,
            body=to_html(relink(text, source, site, places)),
            place=place,
            root="../" * place.count("/"),
        )
        (site / place).parent.mkdir(exist_ok=True)
        (site / place).write_text(html, encoding="utf-8")


def title(guide: str) -> str:
    """Returns the first heading of a guide."""
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this checkout, not what is installed
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site")
    build(folder)
    print(f"{folder / 'index.html'}")
