"""Every phrasing of the tables is read as it should be."""

from __future__ import annotations

import pytest
from answers.table import CHOICES, DATES, YES_NO, Group
from answers.table_numbers import EXPRESSIONS, MATH, NUMBERS, TEXTS

from compact.answers import find_domain

TABLES: dict[str, list[Group]] = {
    "choice": CHOICES,
    "yes_no": YES_NO,
    "date": DATES,
    "number": NUMBERS,
    "math": MATH,
    "text": TEXTS,
}
CASES = [
    (name, gold, prompt, *row)
    for name, groups in TABLES.items()
    for gold, prompt, rows in groups
    for row in rows
]


def test_the_tables_are_large() -> None:
    assert len(CASES) >= 250


@pytest.mark.parametrize(("name", "gold", "prompt", "completion", "answer", "right"), CASES)
def test_phrasing(
    name: str, gold: str | None, prompt: str, completion: str, answer: str | None, right: bool
) -> None:
    """The domain, what is extracted (None with `right`: any text) and whether it is right."""
    domain = find_domain(gold, prompt)
    assert domain.name == name
    found = domain.extract(completion)
    if answer is not None or not completion or not right and name != "text":
        assert found == answer
    assert domain.matches(found, gold) is right
    if found is not None:
        assert domain.normalise(found) == found, "the normal form has to be its own normal form"
        assert domain.matches(found, found)


@pytest.mark.parametrize("completion", EXPRESSIONS)
def test_a_number_in_an_expression_is_not_the_answer(completion: str) -> None:
    domain = find_domain("2")
    found = domain.extract(completion)
    assert found is not None and not domain.matches(found, "2")
    assert domain.normalise(found) == found
