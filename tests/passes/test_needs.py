"""What several readers of one pass need together."""

from __future__ import annotations

from dataclasses import fields

import pytest

from compact.passes import Needs
from compact_ops import STATISTICS


@pytest.mark.parametrize("name", [field.name for field in fields(Needs)])
def test_no_need_of_one_reader_is_lost(name: str) -> None:
    """The other readers need nothing; `student` is theirs too unless they say otherwise."""
    value = STATISTICS[:1] if name == "statistics" else True
    without = Needs(student=False)
    one = Needs(**{"student": True, name: value})
    assert getattr(Needs.of_all([without, one, without]), name) == value
    assert Needs.of_all([one]) == one


def test_statistics_come_in_their_order() -> None:
    each = [Needs(statistics=(name,)) for name in reversed(STATISTICS)]
    assert Needs.of_all([*each, *each]).statistics == STATISTICS


def test_nobody_needs_nothing() -> None:
    assert Needs.of_all([]) == Needs(student=False)
