"""Tables in Markdown, of names and texts that may hold its signs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """Returns a text on one line, whose bars end no cell and whose `<` begins no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a table; every cell is escaped.

    Args:
        head: titles of the columns.
        rows: the cells of each row, as many as there are columns.
    """
    lines = ["|" + "---|" * len(head)]
    for row in (head, *rows):
        lines.append("| " + " | ".join(escaped(str(cell)) for cell in row) + " |")
    lines[:2] = reversed(lines[:2])
    return lines
