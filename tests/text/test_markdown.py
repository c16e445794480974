"""Tables in Markdown of names that hold its signs."""

from __future__ import annotations

from compact.text.markdown import markdown_table


def test_no_name_breaks_a_table() -> None:
    assert markdown_table(["teacher", "a|b"], [["x\ny|<z>", 2], ["", None]]) == [
        "| teacher | a\\|b |",
        "|---|---|",
        "| x y\\|&lt;z> | 2 |",
        "|  | None |",
    ]


def test_a_table_may_have_no_row() -> None:
    assert markdown_table(["one"], []) == ["| one |", "|---|"]
