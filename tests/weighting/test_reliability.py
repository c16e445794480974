"""The reliability of `robust`: noise leaves the weights even, agreement sharpens them."""

import pytest
import torch

from compact.weighting import make_weigher


def _run(weigher, problems, teachers, signal, seed):
    """Feeds steps of 8 problems; returns the mean effective number of teachers, 1 / sum alpha^2."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(9) * teachers
    counts = []
    for _ in range(problems // 8):
        quality = torch.randn(8 * teachers, generator=generator)
        scores = {
            axis: signal * quality + torch.randn(8 * teachers, generator=generator)
            for axis in ("adaptability", "consensus", "difficulty")
        }
        weight = weigher.weigh(scores, offsets).weight.view(8, teachers)
        counts.append(float((1.0 / weight.square().sum(1)).mean()))
        weigher.update(scores, offsets)
    return sum(counts) / len(counts)


@pytest.mark.parametrize("teachers", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_random_scores_keep_four_fifths_of_the_teachers(teachers, seed):
    weigher = make_weigher("robust")
    assert _run(weigher, 400, teachers, 0.0, seed) >= 0.8 * teachers


def test_without_reliability_noise_concentrates_the_weights():
    # What the test above would find if the factor did nothing.
    assert _run(make_weigher("robust", reliable=False), 400, 4, 0.0, 0) < 0.8 * 4


def test_axes_that_agree_are_reliable():
    weigher = make_weigher("robust")
    effective = _run(weigher, 400, 4, 3.0, 0)
    assert weigher.reliability > 0.7
    assert effective < 3.0


def test_reliability_is_cronbachs_alpha():
    weigher = make_weigher("robust", beta=(1.0, 1.0, 0.0), shrink=0.0)
    generator = torch.Generator().manual_seed(1)
    quality = torch.randn(5000, 4, generator=generator).double()
    a = quality + torch.randn(5000, 4, generator=generator)
    b = quality + torch.randn(5000, 4, generator=generator)
    scores = {"adaptability": a.flatten(), "consensus": b.flatten(), "difficulty": a.flatten()}
    weigher.update(scores, torch.arange(5001) * 4)

    def standardised(x):
        return (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)

    correlation = float((standardised(a) * standardised(b)).mean())
    wanted = 2 * correlation / (1 + correlation) * 5000 / 5016
    assert weigher.reliability == pytest.approx(wanted, rel=1e-6)


def test_first_step_is_uniform_and_state_is_kept():
    weigher = make_weigher("robust")
    scores = {axis: torch.tensor([1.0, 2.0, 4.0]) for axis in ("adaptability", "consensus")}
    scores["difficulty"] = torch.zeros(3)
    offsets = torch.tensor([0, 3])
    assert weigher.weigh(scores, offsets).weight.tolist() == pytest.approx([1 / 3] * 3)
    weigher.update(scores, offsets)
    other = make_weigher("robust")
    other.load_state_dict(weigher.state_dict())
    assert other.reliability == weigher.reliability > 0
    assert torch.equal(other.weigh(scores, offsets).weight, weigher.weigh(scores, offsets).weight)


def test_one_axis_has_no_reliability():
    with pytest.raises(ValueError, match="robust: reliable needs two axes.*adaptability"):
        make_weigher("robust", consensus="none")
    make_weigher("robust", consensus="none", reliable=False)
