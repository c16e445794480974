"""Data without gold answers: who refuses them, and in which words."""

from __future__ import annotations

import pytest

from compact.data import Problem
from compact.passes import Needs, Pass
from compact.weighting import check_gold, make_weigher
from compact.weighting.policies import register_policy

KNOWN, UNKNOWN = Problem("a", "1?", "1", ()), Problem("b", "2?", None, ())


@pytest.mark.parametrize(
    "name, overrides, reader",
    [
        ("paper", {}, "probe of paper"),
        ("released", {}, "probe-released of released"),
        ("rejection", {}, "rejection"),
        ("paper", {"adaptability": "none", "consensus": "gold-weighted"}, "gold-weighted of paper"),
    ],
)
def test_refused_if_no_problem_has_one(
    name: str, overrides: dict[str, str], reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    weigher = make_weigher(name, **overrides)
    check_gold(weigher, [KNOWN])
    assert not caplog.text
    check_gold(weigher, [KNOWN, UNKNOWN, UNKNOWN])
    assert f"{reader}: 2 of 3 problems have no gold answer" in caplog.text
    with pytest.raises(ValueError, match=f"preset: {reader} needs gold answers.*answer-vote") as e:
        check_gold(weigher, [UNKNOWN])
    named = str(e.value).partition("these need none: ")[2].split(", ")
    assert {"uniform", "single:TEACHER"} <= set(named)
    assert not {"paper", "released", "rejection"} & set(named)


@pytest.mark.usefixtures("own_registries")
def test_a_policy_that_reads_them_is_not_recommended() -> None:
    @register_policy("mine")
    def mine() -> object:
        def policy(pass_: Pass, steps: int) -> object:
            raise AssertionError

        policy.needs = Needs(gold=True)
        return policy

    with pytest.raises(ValueError, match="preset: mine needs gold answers") as e:
        check_gold(make_weigher("mine"), [UNKNOWN])
    named = str(e.value).partition("these need none: ")[2].split(", ")
    assert "uniform" in named and not {"mine", "rejection"} & set(named)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("uniform", {}),
        ("answer-vote", {}),
        ("robust", {}),
        ("oracle", {"teachers": ["a"]}),
        ("paper", {"adaptability": "none"}),
        ("paper", {"beta": [0, 1, 0.5]}),
    ],
)
def test_what_reads_none_takes_any_data(name: str, overrides: dict[str, object]) -> None:
    check_gold(make_weigher(name, **overrides), [UNKNOWN])
