"""Writes the table and the picture of a study from the answers that its runs gave.

    python tools/study_page.py docs/results/study.csv

The file is the paired.csv of `compact compare`. STEM.md and STEM.png are written beside it; in an
existing STEM.md only the part between the two marker lines is replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compact.evaluation.paired import as_markdown, draw, paired_rows, read_csv, with_best_single
from compact.graphs.drawing import picture_of

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, metavar="CSV", help="paired.csv of the comparison")
    path: Path = parser.parse_args().answers
    rows = paired_rows(with_best_single(read_csv(path)))
    page = path.with_suffix(".md")
    picture = path.with_suffix(".png")
    table = f"{BEGIN}\n{as_markdown(rows)}\n![Accuracy of each arm]({picture.name})\n{END}\n"
    before, after = "# Study\n\n", ""
    if page.exists():
        text = page.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise SystemExit(f"{page}: expected the lines {BEGIN} and {END}, found none")
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1].lstrip("\n")
    page.write_text(before + table + after, encoding="utf-8")
    picture.write_bytes(picture_of(draw(rows), "png", tidy=True))


if __name__ == "__main__":
    main()
