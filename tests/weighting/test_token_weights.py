"""Token weights: their formulas, training with them against a plain loop, a user's own, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compact.config import CompactConfig
from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.trainer import CompactTrainer
from compact.weighting import (
    check_token_weights,
    register_token_weights,
    weigh_tokens,
)
from compact_ops import TokenStats, linear_token_stats
from helpers import trajectories
from helpers.trajectories import TEACHERS, WEIGHED, rows_of, train

pytestmark = pytest.mark.usefixtures("own_registries")

NAMES = ("dft", "eaft", "cll")


def sharp_model(tokenizer: Any, seed: int, layers: int) -> Any:
    """The model of `train` with larger logits: an untrained head is almost uniform."""
    model = build_model(tokenizer, seed=seed, layers=layers)
    with torch.no_grad():
        model.model.norm.weight.mul_(6)
    return model


@pytest.fixture(autouse=True)
def _sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "build_model", sharp_model)


def by_hand(name: str, logp: Tensor, ids: Tensor) -> Tensor:
    """The weights [T] from log-probabilities [T, V], written out again."""
    p = logp.exp()
    told = p.gather(1, ids[:, None])[:, 0]
    entropy = -(p * logp).sum(dim=1)
    return {
        "none": torch.ones_like(told),
        "dft": told,
        "eaft": torch.minimum(entropy / math.log(20), torch.ones_like(told)),
        "cll": torch.minimum(told * entropy.exp(), torch.ones_like(told)),
    }[name].detach()


def plain_loop(rows: list[dict[str, str]], name: str) -> tuple[list[float], Tensor]:
    """Two steps in plain torch: mean over problems, rationales and tokens of w_t nll_t."""
    tokenizer = build_tokenizer()
    model = sharp_model(tokenizer, seed=0, layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(2):
        terms = []
        for problem in load_problems(rows):
            encoded = encode_problem(problem, tokenizer, max_length=400)
            own = []
            for rationale in encoded.rationales:
                ids = torch.tensor([*encoded.prompt_ids, *rationale.ids])
                start = len(encoded.prompt_ids)
                logp = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
                nll = -logp.gather(1, ids[start:, None])[:, 0]
                own.append((by_hand(name, logp, ids[start:]) * nll).mean())
            terms.append(torch.stack(own).mean())
        loss = torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["none", *NAMES])
def test_weights_are_their_formulas(name: str) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 8), 2 * torch.randn(41, 8)
    target = torch.randint(0, 41, (50,))
    found = weigh_tokens(name, linear_token_stats(hidden, head, target))
    wanted = by_hand(name, (hidden @ head.T).double().log_softmax(-1), target)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert name == "none" or found.std() > 0.01
    assert float(found.min()) >= 0.0 and float(found.max()) <= 1.0


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_training_equals_a_plain_loop(tmp_path: Path, name: str, layout: str) -> None:
    """Losses and parameters: the loss by hand, and no gradient through the weights."""
    rows = rows_of(*TEACHERS)
    wanted = plain_loop(rows, name)
    found = train(tmp_path, rows, token_weights=name, layout=layout)
    assert found[0] == pytest.approx(wanted[0], abs=1e-4)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=2e-4 if layout == "tree" else 2e-5)
    plain = train(tmp_path / "plain", rows)
    assert abs(plain[0][0] - found[0][0]) > 0.1


def test_no_gradient_flows_through_the_weights() -> None:
    """The gradient of sum w_t nll_t is the one with the weights as numbers."""
    torch.manual_seed(1)
    hidden = torch.randn(20, 8, requires_grad=True)
    head, target = torch.randn(23, 8), torch.randint(0, 23, (20,))
    for name in NAMES:
        stats = linear_token_stats(hidden, head, target)
        weight = weigh_tokens(name, stats)
        assert not weight.requires_grad
        (found,) = torch.autograd.grad((weight * stats.nll).sum(), hidden)
        again = torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="none")
        (wanted,) = torch.autograd.grad((weight.clone() * again).sum(), hidden)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_they_compose_with_a_preset_and_any_split(tmp_path: Path) -> None:
    """Weights of a preset, leaves, a consistency term; one micro-batch or four."""
    rows = rows_of(*TEACHERS)
    whole = train(tmp_path / "whole", rows, **WEIGHED, token_weights="dft")
    split = train(
        tmp_path / "split",
        rows,
        **WEIGHED,
        token_weights="dft",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert whole[0] == pytest.approx(split[0], abs=1e-4)
    torch.testing.assert_close(whole[1], split[1], rtol=0, atol=2e-5)


def test_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    rows = rows_of(*TEACHERS)
    settings = {**WEIGHED, "token_weights": "cll", "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "whole", rows, **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    resumed = train(tmp_path / "again", rows, **settings, resume_from_checkpoint=checkpoint)
    assert torch.equal(whole[1], resumed[1])


def test_the_log_keeps_the_plain_nll(tmp_path: Path) -> None:
    """Scores of rationales do not change with the setting; only the loss does."""
    from compact.runlog import read_scores

    rows = rows_of(*TEACHERS)
    tables = []
    for name in ("none", "dft"):
        train(tmp_path / name, rows, token_weights=name, max_steps=1)
        tables.append(read_scores(tmp_path / name)["nll"].to_numpy())
    assert tables[0] == pytest.approx(tables[1], abs=1e-5)


def test_own_token_weights_train(tmp_path: Path) -> None:
    """A registered function is named like a built-in one."""

    @register_token_weights("half")
    def half(stats: TokenStats) -> Tensor:
        """0.5 for every token."""
        return torch.full_like(stats.nll, 0.5)

    rows = rows_of("good")
    plain = train(tmp_path / "plain", rows, max_steps=1)
    own = train(tmp_path / "own", rows, max_steps=1, token_weights="half")
    assert own[0][0] == pytest.approx(plain[0][0] / 2, rel=1e-3)


def test_bad_names_and_weights_are_told(tmp_path: Path) -> None:
    args = CompactConfig(output_dir=str(tmp_path), token_weights="dtf")
    with pytest.raises(ValueError, match="token_weights must be one of none, dft.*'dtf'.*'dft'"):
        CompactTrainer(model="no such model", args=args, train_dataset=None)
    stats = linear_token_stats(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
    register_token_weights("sum")(lambda s: s.nll.sum())
    register_token_weights("minus")(lambda s: -s.nll)
    with pytest.raises(ValueError, match=r"token_weights sum must have shape \[M\] = \[3\], got"):
        weigh_tokens("sum", stats)
    with pytest.raises(
        ValueError, match="token_weights minus must be finite and at least 0, got -"
    ):
        check_token_weights("minus", weigh_tokens("minus", stats), stats.nll)
