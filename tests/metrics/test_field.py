"""The metrics of the field against transcriptions in float64 on full logits.

Nothing here calls a helper of a metric. A rationale is run alone through a float64 copy of the
student, and each formula is written out again over its rows.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from compact.metrics import get_metric, metric_names
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact_ops import STATISTICS
from helpers.toy import make_model, make_problem

_MODEL = make_model("llama").eval()
with torch.no_grad():
    _MODEL.get_output_embeddings().weight.mul_(20)  # an untrained head is almost uniform
_STUDENT = Student.of(_MODEL)
_EXACT = copy.deepcopy(_MODEL).double()
_TEXTS = (
    "We check it. Perhaps 3 might do, since 4 fails.",
    "Verifying twice, therefore done; checked.",
    "",
    "No such word in 12 of them",
)
LAYOUTS = ("tree", "padded")


def problems() -> list[EncodedProblem]:
    """Two problems with four and two rationales; one rationale ends with its last step."""
    first, second = make_problem(1, [12, 23, 9, 17], steps=3), make_problem(2, [8, 31], prompt=7)
    rationales = [replace(r, text=t) for r, t in zip(first.rationales, _TEXTS, strict=True)]
    last = rationales[2]
    spans = (*last.steps[:-1], (last.steps[-1][0], len(last.ids)))
    rationales[2] = replace(last, steps=spans)
    return [replace(first, rationales=tuple(rationales)), second]


@pytest.fixture(scope="module", params=LAYOUTS)
def finished(request: pytest.FixtureRequest) -> Pass:
    """A pass with answer leaves in each layout."""
    batch = build_batch(problems(), layout=request.param, leaves=True, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch, statistics=STATISTICS)[2]


@dataclass
class Alone:
    """A rationale run alone in float64, with every logit."""

    problem: EncodedProblem
    index: int

    def __post_init__(self) -> None:
        self.rationale = self.problem.rationales[self.index]
        self.prompt = len(self.problem.prompt_ids)
        self.ids = torch.tensor([*self.problem.prompt_ids, *self.rationale.ids])
        self.logp, self.states = full(self.ids)
        everything = self.logp[:-1].gather(1, self.ids[1:, None])[:, 0]
        self.of_prompt = everything[: self.prompt - 1]
        self.of_answer = everything[self.prompt - 1 :]
        rows = self.logp[self.prompt - 1 : -1]
        self.entropy = -(rows.exp() * rows).sum(dim=1)
        self.rows = rows

    def asked(self, end: int) -> Tensor:
        """[m] log-likelihood of the gold answer's tokens after `end` tokens of the rationale."""
        told = self.rationale.ids[:end]
        prefix = [*self.problem.prompt_ids, *told, *self.problem.cue_ids]
        ids = torch.tensor([*prefix, *self.problem.gold_ids])
        logp = full(ids)[0][len(prefix) - 1 : -1]
        return logp.gather(1, ids[len(prefix) :, None])[:, 0]


def full(ids: Tensor) -> tuple[Tensor, Tensor]:
    """[T, V] log-probabilities and [T, H] final hidden states of a text, float64."""
    with torch.no_grad():
        out = _EXACT(input_ids=ids[None], output_hidden_states=True)
    return out.logits[0].double().log_softmax(-1), out.hidden_states[-1][0]


def everyone() -> list[Alone]:
    return [Alone(p, k) for p in problems() for k in range(len(p.rationales))]


def agrees(pass_: Pass, name: str, wanted: list[float], tolerance: float = 2e-5) -> None:
    """The metric gives these values, [R] float32, with a spread that the test can see."""
    found = get_metric(name).score(pass_)
    assert found.shape == (len(wanted),) and found.dtype == torch.float32
    assert np.std(wanted) > 10 * tolerance
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tolerance, atol=tolerance)


def starts_of(one: Alone) -> set[int]:
    """Indices of the first token of each step and of the answer part."""
    starts = {start for start, _ in one.rationale.steps}
    end = one.rationale.steps[-1][1]
    return starts | ({end} if end < len(one.rationale.ids) else set())


def test_grape(finished: Pass) -> None:
    agrees(finished, "grape", [float(one.of_answer.mean()) for one in everyone()])


def test_aslec_drop(finished: Pass) -> None:
    wanted = []
    for one in everyone():
        starts = starts_of(one)
        wanted.append(np.mean([float(s) for t, s in enumerate(one.of_answer) if t not in starts]))
    agrees(finished, "aslec-drop", wanted)


def test_aslec_casl(finished: Pass) -> None:
    """Six rationales: the regression is unique, so any solver finds the same slope."""
    rows = []
    for one in everyone():
        values = one.of_answer.numpy()
        first = np.isin(np.arange(len(values)), list(starts_of(one)))
        rows.append((values.mean(), values[~first].mean(), values[first].mean(), first.mean()))
    mean, others, first, share = np.array(rows).T
    columns = np.stack([np.ones_like(mean), others, first, share], axis=1)
    slope = np.linalg.solve(columns.T @ columns, columns.T @ mean)[3]
    assert abs(slope) > 1e-3
    agrees(finished, "aslec-casl", list(mean - slope * share), tolerance=2e-4)


def test_lark(finished: Pass) -> None:
    """From the gradient of the nll itself: its squared norm at the logits of each row."""
    alone = everyone()
    loss, brier = [], []
    for one in alone:
        gradient = torch.nn.functional.one_hot(one.ids[one.prompt :], one.rows.shape[1])
        loss.append(-float(one.of_answer.mean()))
        brier.append(float((gradient - one.rows.exp()).square().sum(dim=1).mean()))
    wanted = []
    for one, own_loss, own_brier in zip(alone, loss, brier, strict=True):
        mine = [i for i, other in enumerate(alone) if other.problem == one.problem]
        total = sum(loss[i] for i in mine)
        rate = sum(brier[i] for i in mine) / total
        share = own_loss / total  # as in the paper: (L / sum L) (2 rho - sum rho L / sum L)
        wanted.append(share * (2 * own_brier / own_loss - rate))
    agrees(finished, "lark", wanted, tolerance=1e-4)


def test_rsr(finished: Pass) -> None:
    """Ranks by sorting every row."""
    wanted = []
    for one in everyone():
        order = one.rows.argsort(dim=1, descending=True)
        place = (order == one.ids[one.prompt :, None]).int().argmax(dim=1)
        ranks = (place + 1).clamp(max=100)
        wanted.append(float(ranks.sum()) / -float(one.of_answer.sum()))
    agrees(finished, "rsr", wanted, tolerance=1e-4)


def test_scas_final(finished: Pass) -> None:
    wanted = []
    for one in everyone():
        unit = one.states / one.states.norm(dim=1, keepdim=True)
        asked, told = unit[: one.prompt], unit[one.prompt :]
        d_answer, d_question = -float(one.of_answer.mean()), -float(one.of_prompt.mean())
        own = float((told @ told.T).mean())  # as published: the mean over all pairs
        shared = float((told @ asked.T).mean())
        wanted.append(0.5 * d_answer**2 * own + 0.5 * d_answer * d_question * shared)
    agrees(finished, "scas-final", wanted, tolerance=1e-4)


def test_scas(finished: Pass) -> None:
    """The activations of the last up_proj, written out from the weights of the exact model."""
    last = _EXACT.get_base_model().model.layers[-1]
    kept: list[Tensor] = []
    lock = last.post_attention_layernorm.register_forward_hook(lambda m, i, o: kept.append(o))
    wanted = []
    for one in everyone():
        with torch.no_grad():
            kept.clear()
            _EXACT(input_ids=one.ids[None])
            states = kept[0][0] @ last.mlp.up_proj.weight.T
        unit = states / states.norm(dim=1, keepdim=True)
        asked, told = unit[: one.prompt], unit[one.prompt :]
        d_answer, d_question = -float(one.of_answer.mean()), -float(one.of_prompt.mean())
        own, shared = float((told @ told.T).mean()), float((told @ asked.T).mean())
        wanted.append(0.5 * d_answer**2 * own + 0.5 * d_answer * d_question * shared)
    lock.remove()
    agrees(finished, "scas", wanted, tolerance=1e-4)


def test_scas_needs_up_proj(finished: Pass) -> None:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    student = Student.of(GPT2LMHeadModel(GPT2Config(**sizes)).eval())
    with pytest.raises(ValueError, match="scas: student must have modules up_proj"):
        get_metric("scas").score(replace(finished, student=student))


def test_lalp(finished: Pass) -> None:
    """Every step alone, after the two parts before it; the prompt is the part before the first."""
    wanted = []
    for one in everyone():
        ids, steps = one.rationale.ids, one.rationale.steps
        parts = [list(one.problem.prompt_ids)]
        parts += [list(ids[start:end]) for start, end in steps]
        assert sum(map(len, parts[1:])) == steps[-1][1]  # no gaps between steps in this data
        if steps[-1][1] < len(ids):
            parts.append(list(ids[steps[-1][1] :]))
        means = []
        for i in range(1, len(parts)):
            before = sum(parts[max(0, i - 2) : i], [])
            logp = full(torch.tensor(before + parts[i]))[0][len(before) - 1 : -1]
            means.append(float(logp.gather(1, torch.tensor(parts[i])[:, None]).mean()))
        wanted.append(sum(means) / len(means))
    agrees(finished, "lalp", wanted, tolerance=1e-4)


def test_lalp_refuses_shards(finished: Pass) -> None:
    """Processes with other numbers of steps would wait for each other for ever."""
    head = finished.student.head
    head.__dict__["ds_id"] = 0  # as DeepSpeed marks a module
    try:
        with pytest.raises(ValueError, match="lalp must be used with a whole student"):
            get_metric("lalp").score(finished)
    finally:
        del head.__dict__["ds_id"]


def test_scas_final_leaves_out_special_tokens(finished: Pass) -> None:
    """With a tokenizer, its special tokens count neither in the question nor in the answer."""
    pool = problems()
    special = [pool[0].prompt_ids[0], pool[0].prompt_ids[2], pool[0].rationales[0].ids[3]]

    class Tokenizer:
        all_special_ids = special

    found = get_metric("scas-final").score(
        replace(finished, student=replace(_STUDENT, processing_class=Tokenizer()))
    )
    wanted = []
    for one in everyone():
        keep = ~torch.isin(one.ids, torch.tensor(special))
        unit = one.states / one.states.norm(dim=1, keepdim=True)
        in_answer = torch.arange(len(one.ids)) >= one.prompt
        asked, told = unit[keep & ~in_answer], unit[keep & in_answer]
        nll = -torch.cat([one.of_prompt.new_zeros(1), one.of_prompt, one.of_answer])
        counted = keep & (torch.arange(len(one.ids)) > 0)
        d_question = float(nll[counted & ~in_answer].mean())
        d_answer = float(nll[counted & in_answer].mean())
        own, shared = float((told @ told.T).mean()), float((told @ asked.T).mean())
        wanted.append(0.5 * d_answer**2 * own + 0.5 * d_answer * d_question * shared)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


def test_answer_gain(finished: Pass) -> None:
    net, least, mean_prob, rlt = [], [], [], []
    for one in everyone():
        levels = [one.asked(0), *(one.asked(end) for _, end in one.rationale.steps)]
        means = [float(level.mean()) for level in levels]
        net.append(means[-1] - means[0])
        least.append(min(after - before for before, after in zip(means, means[1:], strict=False)))
        rise = float(levels[-1].exp().mean() - levels[0].exp().mean())
        mean_prob.append(min(max(rise, 0.0), 1.0))
        surprise = float(-one.of_answer.mean()) + 0.01 * float((-one.of_answer).max())
        rlt.append(means[-1] + 0.01 * float(levels[-1].min()) - 3 * surprise)
    agrees(finished, "answer-gain-net", net, tolerance=1e-4)
    agrees(finished, "answer-gain-least", least, tolerance=1e-4)
    agrees(finished, "answer-gain-mean-prob", mean_prob, tolerance=1e-5)
    agrees(finished, "answer-gain-rlt", rlt, tolerance=1e-4)


def test_answer_gain_under_a_leaf_budget() -> None:
    """Steps without a leaf: only `least` changes, to the least change between leaves."""
    pool = problems()
    few = [
        replace(
            p, rationales=tuple(replace(r, leaf_steps=(len(r.steps) - 1,)) for r in p.rationales)
        )
        for p in pool
    ]
    passes = []
    for some in (pool, few):
        batch = build_batch(some, layout="tree", leaves=True, pad_token_id=0)
        with torch.no_grad():
            passes.append(run_pass(_STUDENT, batch)[2])
    for reduce in ("net", "mean-prob", "rlt"):
        score = get_metric(f"answer-gain-{reduce}").score
        torch.testing.assert_close(score(passes[1]), score(passes[0]), rtol=1e-5, atol=1e-5)
    least, net = (get_metric(f"answer-gain-{name}").score for name in ("least", "net"))
    torch.testing.assert_close(least(passes[1]), net(passes[1]))


def test_answer_gain_needs_leaves() -> None:
    batch = build_batch(problems(), layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        bare = run_pass(_STUDENT, batch)[2]
    for reduce in ("net", "least", "mean-prob", "rlt"):
        metric = get_metric(f"answer-gain-{reduce}")
        assert metric.needs.leaves
        with pytest.raises(ValueError, match="built with leaves=True, got no answer leaves"):
            metric.score(bare)


def test_controls(finished: Pass) -> None:
    alone = everyone()
    agrees(finished, "length", [len(one.rationale.ids) for one in alone])
    agrees(finished, "steps", [len(one.rationale.steps) for one in alone])
    draws = [Random(f"{one.problem.question_id}/t{one.index}").random() for one in alone]
    agrees(finished, "random", draws)
    agrees(finished, "uncertain-tokens", [float(one.entropy.max()) for one in alone])
    # 8 words: check, perhaps, might, since; 5 words: verifying, therefore, checked.
    words = [100 * 0.95 / 8, 100 * 0.65 / 5, 0, 0, 0, 0]
    agrees(finished, "checking-words", words)


def test_uncertain_tokens_are_half_a_percent() -> None:
    """201 tokens have two of them."""
    problem = make_problem(5, [201, 200])
    batch = build_batch([problem], layout="tree", leaves=False, pad_token_id=0)
    with torch.no_grad():
        found = get_metric("uncertain-tokens").score(run_pass(_STUDENT, batch)[2])
    for k, count in enumerate((2, 1)):
        largest = sorted(Alone(problem, k).entropy.tolist())[-count:]
        assert float(found[k]) == pytest.approx(math.fsum(largest), rel=1e-5)


def test_controls_stand_on_no_axis_of_a_preset() -> None:
    """They are listed with all metrics, and with none of the three axes."""
    controls = set(metric_names("control"))
    assert controls == {"length", "steps", "random", "checking-words", "uncertain-tokens"}
    assert controls <= set(metric_names())
    with pytest.raises(ValueError, match="metric of difficulty must be one of nll, "):
        get_metric("length", "difficulty")
