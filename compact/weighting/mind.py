"""MIND: a small network learns during training how to weigh the rationales.

Features of the K rationales of a problem go through a shared MLP, self-attention over the K and a
linear layer to scores s. The network learns to predict where the student's loss will be small:

    L_meta = KL(softmax(s / tau) || softmax(-loss / tau)),

with a learning rate of its own and gradients that are summed over `every` optimizer steps before it
moves ("inertia"). alpha = softmax(s / tau) over the rationales whose share is at least beta times
that of the best; the others get 0.

Source: MIND (arXiv 2601.03717). Ours: the features. They are mean entropy, log length and the
consistency of the answer, each standardised within the problem, and a fixed random code of the
teacher's name. The loss is not among them: the network would copy it, noise included. The optimum
is then softmax(-mean loss / tau) given the features. The network is trained on the scores of an
optimizer step, which the trainer gathers from all ranks.

The consistency of rationale k is 1 - JSD / ln 2 of its distribution of answers and that of another
rationale, averaged over the others. `consistency: stated`: each rationale's distribution is all on
the answer that it states, so this is the share of the others that state the same.
`consistency: believed`: it is the student's, over the options of the question after the steps that
state no answer; that is the metric `posterior-consensus`, and it costs option leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from compact.metrics import get_metric
from compact.options import check_number
from compact.passes import Needs, Pass
from compact.passes.segments import segment_mean
from compact.passes.transfer import put
from compact.weighting.policies import StatefulPolicy, register_policy

FEATURES = ("entropy", "length", "consistency")
CODES = tuple(f"code {i}" for i in range(4))


class SideNet(nn.Module):
    """Shared MLP, self-attention over the rationales of a problem, one score for each."""

    def __init__(self, features: int = len(FEATURES + CODES), width: int = 16) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)  # equal scores at first
        nn.init.zeros_(self.score.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the scores [K] of a problem's features [K, F]."""
        x = self.mlp(features)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        scores: Tensor = self.score(x + mixed)[:, 0]
        return scores


class Mind(StatefulPolicy):
    """The policy `mind`; its state is the network, its optimizer and the summed gradients."""

    def __init__(
        self, tau: float, beta: float, rate: float, every: int, seed: int, consistency: str
    ) -> None:
        check_number("tau", tau, least=1e-6)
        check_number("beta", beta, least=0, most=1)
        check_number("rate", rate, least=0)
        check_number("every", every, least=1, whole=True)
        check_number("seed", seed, whole=True)
        if consistency not in ("stated", "believed"):
            raise ValueError(f"consistency must be stated or believed, got {consistency!r}")
        believed = get_metric("posterior-consensus")
        self.needs = believed.needs if consistency == "believed" else Needs()
        self.consistency = believed.score if consistency == "believed" else stated
        self.tau, self.beta, self.every = tau, beta, every
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = SideNet()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=rate)
        self.steps = 0
        self._log: dict[str, float] = {}

    def scores(self, pass_: Pass) -> dict[str, Tensor]:
        """Returns loss and features, before standardising."""
        batch, stats = pass_.batch, pass_.stats
        tokens = batch.token_offsets
        codes = torch.tensor([_code(teacher) for teacher in batch.teachers])
        return {
            **{name: codes[:, i].to(tokens.device) for i, name in enumerate(CODES)},
            "nll": segment_mean(stats.nll, tokens).float(),
            "entropy": segment_mean(stats.entropy, tokens).float(),
            "length": tokens.diff().float().log(),
            "consistency": self.consistency(pass_).float(),
        }

    def weigh(self, scores: Mapping[str, Tensor], pass_: Pass) -> Tensor:
        """Returns softmax(s / tau) over the rationales that are kept."""
        parts = []
        for features in _standardised(scores, pass_.batch.problem_offsets):
            with torch.enable_grad():
                share = (self.net(features) / self.tau).softmax(0).detach()
            share = torch.where(share >= self.beta * share.max(), share, 0.0)
            parts.append(share / share.sum())
        return torch.cat(parts).to(pass_.batch.problem.device)

    def update(self, scores: Mapping[str, Tensor], offsets: Tensor) -> None:
        """Adds the gradient of L_meta; every `every` steps the network moves."""
        losses = scores["nll"].cpu().split(offsets.diff().tolist())
        terms = []
        with torch.enable_grad():
            for features, loss in zip(_standardised(scores, offsets), losses, strict=True):
                if len(loss) > 1:
                    log_p = (self.net(features) / self.tau).log_softmax(0)
                    log_t = (-loss / self.tau).log_softmax(0)
                    terms.append((log_p.exp() * (log_p - log_t)).sum())
            if not terms:
                return
            meta = torch.stack(terms).mean()
            (meta / self.every).backward()
        self._log = {"meta loss": float(meta.detach())}
        self.steps += 1
        if self.steps % self.every == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def take_log(self) -> dict[str, float]:
        """Returns the last L_meta."""
        found, self._log = self._log, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns weights, gradients and the moments of Adam as lists."""
        return {
            "steps": self.steps,
            "net": _lists(self.net.state_dict()),
            "grad": _lists({n: p.grad for n, p in self.net.named_parameters()}),
            "moments": {
                str(i): _lists(own) for i, own in self.optimizer.state_dict()["state"].items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.steps = int(state["steps"])
        self.net.load_state_dict(_tensors(state["net"]))
        for name, p in self.net.named_parameters():
            found = state["grad"].get(name)
            p.grad = None if found is None else torch.tensor(found)
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(i): _tensors(own) for i, own in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def stated(pass_: Pass) -> Tensor:
    """Returns [R] the share of the other rationales that state the same answer; 0 for a lone one.

    It is the mean of 1 - JSD / ln 2 for distributions on one answer each: ln 2 apart or equal. A
    rationale without an answer agrees with none.
    """
    shares = []
    for problem in pass_.batch.problems:
        answers = [r.answer for r in problem.rationales]
        others = max(len(answers) - 1, 1)
        shares += [(answers.count(a) - 1) / others if a is not None else 0.0 for a in answers]
    return put(shares, pass_.batch.problem)


def _code(teacher: str) -> list[float]:
    """Returns numbers that depend on the name only."""
    rng = Random(teacher)
    return [rng.gauss(0.0, 1.0) for _ in CODES]


def _standardised(scores: Mapping[str, Tensor], offsets: Tensor) -> list[Tensor]:
    """Returns the features [K, F] of each problem on the CPU: mean 0 and deviation 1 or 0."""
    sizes = offsets.diff().tolist()
    parts = [
        torch.stack([scores[name].detach().cpu().float() for name in names], dim=1).split(sizes)
        for names in (FEATURES, CODES)
    ]
    found = []
    for own, codes in zip(*parts, strict=True):
        centred = own - own.mean(0)
        scale = centred.square().mean(0).sqrt()
        standard = centred / torch.where(scale > 1e-6, scale, 1.0)
        found.append(torch.cat([standard, codes], dim=1))
    return found


def _lists(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {name: t.tolist() for name, t in tensors.items() if t is not None}


def _tensors(lists: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in lists.items()}


@register_policy("mind")
def mind(
    tau: float = 0.2,
    beta: float = 0.1,
    rate: float = 3e-3,
    every: int = 4,
    seed: int = 0,
    consistency: str = "stated",
) -> StatefulPolicy:
    """Weights of a side network that learns which rationales the student will fit well (MIND)."""
    return Mind(tau, beta, rate, every, seed, consistency)
