"""Named means for a line of a log."""

from __future__ import annotations

from compact.means import Means


def test_a_mean_is_of_all_values_since_the_last_time() -> None:
    means = Means()
    means.add("b", 6.0, 3)
    means.add("a", 1.0)
    means.add("b", 4.0, 2)
    means.add("of nothing", 0.0, 0)
    assert list(means.take().items()) == [("b", 2.0), ("a", 1.0)]
    assert means.take() == {}


def test_the_sums_of_processes_add_up() -> None:
    each, together = [Means(), Means()], Means()
    each[0].add("loss", 9.0, 3)
    each[1].add("loss", 1.0, 2)
    each[1].add("gold", 5.0)
    for name, (total, count) in (item for means in each for item in means.sums.items()):
        together.add(name, total, count)
    assert together.take() == {"loss": 2.0, "gold": 5.0}
