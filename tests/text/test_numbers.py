"""Numbers that a text gives in words."""

from __future__ import annotations

import pytest

from compact.text.numbers import numbers_in_words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Twenty-five boxes of a dozen", ("25", "12")),
        ("six cups, and two more", ("6", "2")),
        ("a 6-ounce cup, 3 times", ("6",)),
        ("half of forty", ("2", "40")),
        ("often someone phones", ()),
    ],
)
def test_numbers_in_words(text: str, wanted: tuple[str, ...]) -> None:
    assert numbers_in_words(text) == wanted
