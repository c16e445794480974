"""Writes a table of a study, from what its runs have logged.

    python tools/study_page.py docs/results/study.csv [--page docs/results/study.md]

The file is a paired.csv of `compact compare`, and STEM.png is written beside it; or a compare.csv,
for what the arms cost and what the students forgot. The page, STEM.md beside it unless another is
given, keeps all but what lies between the two lines that name the file.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from statistics import fmean

from compact.evaluation.arm_tables import COSTS
from compact.evaluation.paired import as_markdown, draw, paired_rows, read_csv, with_best_single
from compact.graphs.drawing import picture_of


def accuracies(path: Path, page: Path) -> str:
    """Returns the table of a paired.csv and its picture, which is written beside the file."""
    rows, picture = paired_rows(with_best_single(read_csv(path))), path.with_suffix(".png")
    picture.write_bytes(picture_of(draw(rows), "png", tidy=True))
    shown = os.path.relpath(picture, page.parent)
    return f"{as_markdown(rows)}\n![Accuracy of each arm]({shown})"


def costs(path: Path) -> str:
    """Returns the table of a compare.csv: means over the seeds, of what every run has."""
    arms: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            arms.setdefault(row["arm"], []).append(row)
    runs = [run for of_arm in arms.values() for run in of_arm]
    forms = {"tokens": ("tokens", ",.0f")} | COSTS
    forms = {name: form for name, form in forms.items() if all(run[name] for run in runs)}
    titles = [title for title, _ in forms.values()]
    lines = [f"| {' | '.join(['arm', 'seeds', *titles])} |", "|---|---|" + "--:|" * len(forms)]
    for arm, runs in arms.items():
        seeds = " ".join(run["seed"] for run in runs)
        cells = [format(fmean(float(r[n]) for r in runs), form) for n, (_, form) in forms.items()]
        lines.append(f"| {' | '.join([arm, seeds, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", type=Path, metavar="CSV", help="paired.csv or compare.csv")
    parser.add_argument("--page", type=Path, help="the page (default: the CSV's name, with .md)")
    args = parser.parse_args()
    path: Path = args.answers
    page: Path = args.page or path.with_suffix(".md")
    name = os.path.relpath(path, page.parent)
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    with path.open(newline="") as file:
        of_runs = "peak_mb" in next(csv.reader(file), ())
    table = f"{begin}\n{costs(path) if of_runs else accuracies(path, page)}\n{end}"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Study\n\n{begin}{end}\n"
    if begin not in text or end not in text:
        raise SystemExit(f"{page}: expected the lines {begin} and {end}, found none")
    before, rest = text.split(begin, 1)
    page.write_text(before + table + rest.split(end, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
