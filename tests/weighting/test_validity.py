"""Validity multiplies what the other axes give."""

from __future__ import annotations

import pytest
import torch

from compact import Pass, register_metric
from compact.weighting import make_weigher

OFFSETS = torch.tensor([0, 3])
AXES = {axis: torch.zeros(3) for axis in ("adaptability", "consensus", "difficulty")}


def weights(validity: list[float], offsets: torch.Tensor = OFFSETS, **axes: torch.Tensor) -> list:
    scores = {**AXES, **axes, "validity": torch.tensor(validity)}
    return make_weigher("robust").weigh(scores, offsets).weight.tolist()


def test_weights_are_proportional_to_validity_where_the_rest_is_equal() -> None:
    assert weights([0.8, 0.2, 0.0]) == pytest.approx([0.8, 0.2, 0.0])


def test_the_rest_decides_among_the_valid() -> None:
    found = weights([1.0, 1.0, 0.0], consensus=torch.tensor([0.1, 0.9, 1.0]))
    assert found[1] > found[0] > found[2] == 0.0
    assert sum(found) == pytest.approx(1.0)


def test_a_problem_of_invalid_rationales_is_not_used() -> None:
    offsets = torch.tensor([0, 3, 5])
    scores = {axis: torch.zeros(5) for axis in AXES}
    scores["validity"] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    found = make_weigher("robust").weigh(scores, offsets)
    assert found.weight.tolist() == pytest.approx([1 / 3] * 3 + [1.0, 0.0])
    assert found.used.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(("validity", "used"), [(0.0, 0.0), (1e-3, 1.0), (1.0, 1.0)])
def test_a_single_rationale_has_weight_1_and_is_left_out_if_wrong(
    validity: float, used: float
) -> None:
    one = {axis: values[:1] for axis, values in AXES.items()}
    one["validity"] = torch.tensor([validity])
    found = make_weigher("robust").weigh(one, torch.tensor([0, 1]))
    assert found.weight.tolist() == [1.0] and found.used.tolist() == [used]


def test_a_negative_validity_is_refused() -> None:
    with pytest.raises(ValueError, match="validity of judged must be >= 0, got -0.5"):
        weights([1.0, -0.5, 0.2])


def test_validity_alone() -> None:
    weigher = make_weigher("robust", adaptability="none", consensus="none", difficulty="none")
    found = weigher.weigh({"validity": torch.tensor([0.5, 0.25, 0.25])}, OFFSETS).weight
    assert found.tolist() == pytest.approx([0.5, 0.25, 0.25])
    weigher.update({}, OFFSETS)


def test_a_preset_needs_no_gold_if_it_has_a_validity() -> None:
    assert make_weigher("robust").gold_readers == ()
    assert make_weigher("robust", validity="none").gold_readers == ("gain",)


def test_what_is_wrong_has_no_say_in_the_weights_of_the_others() -> None:
    """With `judged`; z of the wrong one is 0."""
    scores = {axis: torch.randn(4, generator=torch.manual_seed(i)) for i, axis in enumerate(AXES)}
    few = {axis: values[[0, 1, 3]] for axis, values in scores.items()}
    scores["validity"] = torch.tensor([1.0, 0.5, 0.0, 1.0])
    few["validity"] = torch.tensor([1.0, 0.5, 1.0])
    weigher = make_weigher("robust")
    ours = weigher.weigh(scores, torch.tensor([0, 4]))
    theirs = weigher.weigh(few, torch.tensor([0, 3]))
    torch.testing.assert_close(ours.weight[[0, 1, 3]], theirs.weight)
    assert ours.weight[2] == 0.0
    assert all(z[2] == 0.0 for z in ours.zscores.values())
    others = [make_weigher("robust"), make_weigher("robust")]
    for other, (given, end) in zip(others, ((scores, 4), (few, 3)), strict=True):
        other.update(given, torch.tensor([0, end]))
    assert others[0].state_dict() == others[1].state_dict()


def test_a_problem_that_is_left_out_keeps_the_order_of_its_rationales() -> None:
    """What `compact metrics` ranks by; training uses none of it."""
    scores = dict(AXES)
    scores["validity"] = torch.tensor([1e-6, 5e-8, 0.0])
    found = make_weigher("robust").weigh(scores, torch.tensor([0, 3]))
    assert found.weight[0] > found.weight[1] > found.weight[2] == 0.0
    assert found.used.tolist() == [0.0] * 3


@pytest.mark.usefixtures("own_registries")
def test_the_scale_of_another_validity_does_not_matter() -> None:
    @register_metric("tiny", axis="validity")
    def tiny(pass_: Pass) -> torch.Tensor:
        return pass_.stats.nll  # never called

    scores = {axis: torch.randn(3, generator=torch.manual_seed(i)) for i, axis in enumerate(AXES)}
    offsets = torch.tensor([0, 3])
    weigher = make_weigher("robust", validity="tiny")
    assert weigher.skips is None
    small = weigher.weigh({**scores, "validity": torch.tensor([2e-9, 1e-9, 0.0])}, offsets)
    large = weigher.weigh({**scores, "validity": torch.tensor([2.0, 1.0, 0.0])}, offsets)
    torch.testing.assert_close(small.used, large.used)
    assert float(small.used.sum()) == pytest.approx(1.0)
