"""Writes the table and the picture of a study from the answers that its runs gave.

    python tools/study_page.py docs/results/study.csv [--page docs/results/study.md]

The file is the paired.csv of `compact compare`. STEM.png is written beside it. The page, STEM.md
beside it unless another is given, keeps all but what lies between the two lines that name the file.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from compact.evaluation.paired import as_markdown, draw, paired_rows, read_csv, with_best_single
from compact.graphs.drawing import picture_of


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, metavar="CSV", help="paired.csv of the comparison")
    parser.add_argument("--page", type=Path, help="the page (default: the CSV's name, with .md)")
    args = parser.parse_args()
    path: Path = args.answers
    page: Path = args.page or path.with_suffix(".md")
    rows = paired_rows(with_best_single(read_csv(path)))
    picture = path.with_suffix(".png")
    name, shown = (os.path.relpath(file, page.parent) for file in (path, picture))
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    table = f"{begin}\n{as_markdown(rows)}\n![Accuracy of each arm]({shown})\n{end}"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Study\n\n{begin}{end}\n"
    if begin not in text or end not in text:
        raise SystemExit(f"{page}: expected the lines {begin} and {end}, found none")
    before, rest = text.split(begin, 1)
    page.write_text(before + table + rest.split(end, 1)[1], encoding="utf-8")
    picture.write_bytes(picture_of(draw(rows), "png", tidy=True))


if __name__ == "__main__":
    main()
