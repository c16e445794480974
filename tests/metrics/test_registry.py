"""The registry: a metric of a user's own, what it is refused, and what it may not do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compact.config import CompactConfig
from compact.metrics import AXES, CONTROL, get_metric, metric_names, register
from compact.passes import Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.passes.segments import segment_mean
from compact.student import Student
from compact.trainer import CompactTrainer
from compact.weighting import make_weigher
from helpers.toy import ThinkingWords, make_model, make_problem

pytestmark = pytest.mark.usefixtures("own_registries")

_STUDENT = replace(
    Student.of(make_model("llama").eval()), processing_class=ThinkingWords(3, 11, 40)
)


@pytest.fixture
def finished() -> Pass:
    """The pass of a problem with three rationales."""
    batch = build_batch([make_problem(1, [5, 9, 7])], layout="tree", leaves=True, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def test_a_metric_of_ten_lines_weighs(finished: Pass) -> None:
    """The example of docs/metrics.md: registered, named in a preset, used."""

    @register("sureness", axis="adaptability")
    def sureness(pass_: Pass) -> torch.Tensor:
        """Returns [R]: minus the student's mean entropy (nats) over each rationale."""
        return -segment_mean(pass_.stats.entropy, pass_.batch.token_offsets)

    assert "sureness" in metric_names("adaptability")
    weights = make_weigher("paper", adaptability="sureness", beta=(1.0, 0.0, 0.0))(finished)
    surest = int(weights.scores["adaptability"].argmax())
    assert int(weights.weight.argmax()) == surest
    assert float(weights.weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("which", ["model", "body"])
def test_a_metric_cannot_start_another_forward(finished: Pass, which: str) -> None:
    """Neither through the model nor through its body; afterwards both run again."""

    @register("greedy", axis="consensus")
    def greedy(pass_: Pass) -> torch.Tensor:
        getattr(pass_.student, which)(input_ids=pass_.batch.main.input_ids)
        return torch.zeros(pass_.batch.num_rationales)

    with pytest.raises(RuntimeError, match="metric greedy must not run the student"):
        make_weigher("paper", consensus="greedy")(finished)
    getattr(_STUDENT, which)(input_ids=finished.batch.main.input_ids)


def test_a_metric_leaves_no_graph(finished: Pass) -> None:
    """Weights carry no gradient, whatever a metric computes with."""

    @register("norm", axis="difficulty")
    def norm(pass_: Pass) -> torch.Tensor:
        return pass_.student.weight.norm().expand(pass_.batch.num_rationales)

    assert _STUDENT.weight.requires_grad or any(
        p.requires_grad for p in _STUDENT.model.parameters()
    )
    assert not get_metric("norm").score(finished).requires_grad


def test_a_wrong_shape_is_named(finished: Pass) -> None:
    """One score a rationale, not one a token."""
    register("tokens", axis="difficulty")(lambda pass_: pass_.stats.nll)
    with pytest.raises(ValueError, match=r"tokens must have shape \[R\] = \[3\], got \[21\]"):
        make_weigher("paper", difficulty="tokens")(finished)


def test_a_taken_name_is_refused() -> None:
    """Two functions cannot share a name; loading one twice is no harm."""

    def mine(pass_: Pass) -> torch.Tensor:
        return pass_.stats.nll

    register("mine", axis="consensus")(mine)
    register("mine", axis="consensus")(mine)
    with pytest.raises(ValueError, match="metric 'mine' is already taken by .*mine"):
        register("mine", axis="consensus")(lambda pass_: pass_.stats.nll)
    with pytest.raises(
        ValueError, match="axis must be one of .*, difficulty, control, got 'style'"
    ):
        register("other", axis="style")
    with pytest.raises(ValueError, match="direction of other must be lower for axis difficulty"):
        register("other", axis="difficulty", direction="higher")
    with pytest.raises(ValueError, match="direction of other must be higher or lower for axis con"):
        register("other", axis="control", direction="up")
    register("brevity", axis="control", direction="lower")(lambda pass_: pass_.stats.nll)
    assert get_metric("brevity").direction == "lower"
    assert (get_metric("nll").direction, get_metric("gain").direction) == ("lower", "higher")


def test_unknown_metrics_are_told_with_what_there_is() -> None:
    """The message lists the metrics of the axis."""
    with pytest.raises(ValueError, match="metric of consensus must be one of .*step-graph.*'nll'"):
        make_weigher("robust", consensus="nll")
    with pytest.raises(ValueError, match="metric must be one of .*gain.*, got 'gold'"):
        get_metric("gold")
    assert {get_metric(name).axis for name in metric_names()} == {*AXES, CONTROL}


def test_metrics_without_their_leaves_say_so(finished: Pass) -> None:
    """`gain` and `gold-weighted` read answer leaves, which must have been asked for."""
    batch = build_batch([make_problem(1, [5, 9])], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        bare = run_pass(_STUDENT, batch)[2]
    for name in ("gain", "gold-weighted"):
        assert get_metric(name).needs.leaves
        with pytest.raises(ValueError, match="built with leaves=True, got no answer leaves"):
            get_metric(name).score(bare)


def test_the_weigher_asks_for_the_statistics_of_its_metrics(finished: Pass) -> None:
    """A pass without them is refused; `run_pass` computes those that the weigher names."""

    @register("flat", axis="consensus", statistics=("sum_p2", "rank"))
    def flat(pass_: Pass) -> torch.Tensor:
        """Returns [R]: the mean of sum p^2 over each rationale."""
        assert pass_.stats.sum_p2 is not None
        return segment_mean(pass_.stats.sum_p2, pass_.batch.token_offsets)

    weigher = make_weigher("paper", consensus="flat", difficulty="rsr")
    assert weigher.needs.statistics == ("rank", "sum_p2")
    assert make_weigher("paper").needs.statistics == ()
    with pytest.raises(ValueError, match=r"metric flat: .*statistics=\('sum_p2', 'rank'\)"):
        weigher(finished)
    with torch.no_grad():
        live, _, pass_ = run_pass(_STUDENT, finished.batch, statistics=weigher.needs.statistics)
    assert live.margin is None and not pass_.stats.sum_p2.requires_grad
    weights = weigher(pass_)
    assert bool((weights.scores["consensus"] > 0).all()) and "difficulty" in weights.scores
    with pytest.raises(ValueError, match="register: statistics must be one of rank, .*'rnak'"):
        register("other", axis="consensus", statistics=("rnak",))


def test_kept_leaves_are_refused_where_their_states_are_read(tmp_path: Path) -> None:
    """With leaf_every > 1 there are no leaf states on most steps: told before anything loads."""
    assert get_metric("gold-weighted").needs.leaf_hidden
    args = CompactConfig(
        output_dir=str(tmp_path), leaf_every=4, overrides={"consensus": "gold-weighted"}
    )
    with pytest.raises(ValueError, match="leaf_every must be 1 with metrics .* states .* got 4"):
        CompactTrainer(model="no such model", args=args, train_dataset=None)
