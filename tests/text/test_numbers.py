"""Numbers that a text gives in words."""

from __future__ import annotations

import pytest

from compact.text.numbers import NUMBER, fractions_of, numbers_in_words, plain_fractions


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Twenty-five boxes of a dozen", ("25", "12")),
        ("six cups, and two more", ("6", "2")),
        ("a 6-ounce cup, 3 times", ("6",)),
        ("half of forty", ("2", "40")),
        ("tripled, thrice and halved, then quadruples", ("3", "2", "4")),
        ("often someone phones", ()),
    ],
)
def test_numbers_in_words(text: str, wanted: tuple[str, ...]) -> None:
    assert numbers_in_words(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3/4 full, and 1 1/2 cups", "3/4 3/2"),
        ("half of it, a quarter, ½", "1/2 1/4"),
        ("two thirds of 30, three-quarters", "2/3 3/4"),
        ("a fifth of them, a third", "1/5 1/3"),
        ("the third day, the fourth, 05/01/2020, 3/0", ""),
    ],
)
def test_fractions_of(text: str, wanted: str) -> None:
    assert " ".join(map(str, fractions_of(text))) == wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [("答案是16。", ["16"]), ("x16 und é16", []), ("16個、-3個", ["16", "-3"]), ("v1.2.3", [])],
)
def test_numbers_may_follow_scripts_without_spaces(text: str, found: list[str]) -> None:
    assert NUMBER.findall(text) == found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1½ cups", "1 1/2 cups"), ("½", "1/2"), ("$-¾", "$-3/4"), ("2 ⅓", "2 1/3"), ("1/2", "1/2")],
)
def test_fractions_of_one_character(text: str, wanted: str) -> None:
    assert plain_fractions(text) == wanted
