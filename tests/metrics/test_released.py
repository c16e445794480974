"""The `released` preset against an independent transcription of its formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compact.passes import EncodedProblem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.passes.segments import segment_mean
from compact.student import Student
from compact.weighting import make_weigher
from compact.weighting.consistency import consistency_loss
from helpers.toy import CONFIGS, ThinkingWords, make_problem

THINKING = (3, 11, 40, 77, 90)
BETA, LAMBDA = (1.0, 1.0, 0.5), 0.1


def make_student(key_value_heads: int) -> Student:
    """A tiny Llama; fewer key-value heads than 4 make its attention grouped."""
    torch.manual_seed(1)
    config = replace_config(key_value_heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # wider than the usual start, so that scores differ
        parameter.data.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return Student.of(model, ThinkingWords(*THINKING))


def replace_config(key_value_heads: int) -> object:
    """The toy Llama's config with another number of key-value heads."""
    fields = CONFIGS["llama"].to_dict() | {"num_key_value_heads": key_value_heads}
    return type(CONFIGS["llama"])(**fields)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Row-wise, in float64."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def transcription(student: Student, problem: EncodedProblem) -> tuple[np.ndarray, float]:
    """Weights [K] and loss of one problem, from full logits of K padded rows."""
    rows = [problem.prompt_ids + r.ids for r in problem.rationales]
    longest, prompt = max(map(len, rows)), len(problem.prompt_ids)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)], mask[k, : len(row)] = row, 1
    with torch.no_grad():
        out = student.model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_hidden_states=True,
        )
    logits = out.logits.double().numpy()
    hidden = out.hidden_states[-1].double().numpy()  # after the final norm
    attention = student.model.model.layers[-1].self_attn
    w_q = attention.q_proj.weight.detach().double().numpy()
    w_k = attention.k_proj.weight.detach().double().numpy()

    adaptability, difficulty, states = [], [], []
    for k, row in enumerate(rows):
        level = logits[k][:, list(problem.gold_ids)].mean(axis=1)
        score = 0.0
        for t in range(1, longest):
            factor = 1.0 if int(ids[k, t]) in THINKING else 0.1
            score += factor * max(level[t] - level[t - 1], 0.0)
        adaptability.append(score)
        logp = log_softmax(logits[k, prompt - 1 : len(row) - 1])
        labels = np.array(row[prompt:])
        difficulty.append(-logp[np.arange(len(labels)), labels].mean())
        states.append(hidden[k, len(row) - 1])

    query = np.stack(states) @ w_q.T
    key = np.stack(states) @ w_k.T
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    graph = np.exp(log_softmax(query @ key.T / np.sqrt(query.shape[1])))
    np.fill_diagonal(graph, 0.0)
    consensus = graph.sum(axis=0)

    if len(rows) == 1:
        weight = np.ones(1)
    else:
        u = np.zeros(len(rows))
        for beta, score in zip(
            (BETA[0], BETA[1], -BETA[2]), (adaptability, consensus, difficulty), strict=True
        ):
            score = np.asarray(score)
            u += beta * (score - score.mean()) / (score.std(ddof=1) + 1e-4)
        weight = np.exp(log_softmax(u))

    loss = float(weight @ np.asarray(difficulty))
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            if weight[i] * weight[j] < 1e-4:
                continue
            both = (mask[i] * mask[j]).astype(bool)  # the prompt included, the last token included
            p, q = log_softmax(logits[i][both]), log_softmax(logits[j][both])
            divergence = ((np.exp(p) - np.exp(q)) * (p - q)).sum() / both.sum()
            loss += LAMBDA * weight[i] * weight[j] * divergence
    return weight, loss


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[8], [6, 11], [9, 5, 12, 7]])
def test_released_equals_its_transcription(lengths: list[int], key_value_heads: int) -> None:
    """Weights and loss to 1e-4 for K = 1, 2, 4, with and without grouped-query attention."""
    student = make_student(key_value_heads)
    problems = [make_problem(s, lengths) for s in (5, 6)] + [make_problem(7, [14, 3])]
    weigher = make_weigher("released")
    batch = build_batch(problems, layout="padded", leaves=weigher.needs_leaves, pad_token_id=0)
    live, hidden, pass_ = run_pass(student, batch)
    weights = weigher(pass_).weight
    wanted = [transcription(student, problem) for problem in problems]
    np.testing.assert_allclose(weights, np.concatenate([w for w, _ in wanted]), atol=1e-4)
    if len(lengths) > 1:
        assert float(weights.std()) > 0.02  # the scores do tell rationales apart

    nll = segment_mean(live.nll, batch.token_offsets)
    assert weigher.consistency is not None
    term = consistency_loss(hidden, pass_, weights, weigher.consistency.kind)
    loss = (weights * nll).sum() + weigher.consistency.factor * term
    assert float(loss.detach()) == pytest.approx(sum(value for _, value in wanted), abs=1e-4)


def test_released_asks_for_padded_rows() -> None:
    """Padding is part of its formula, so a tree is refused with a reason."""
    student = make_student(2)
    weigher = make_weigher("released")
    assert weigher.needs_padded
    batch = build_batch([make_problem(1, [6, 8])], layout="tree", leaves=False, pad_token_id=0)
    _, _, pass_ = run_pass(student, batch)
    with pytest.raises(ValueError, match="must be padded, got tree"):
        weigher(pass_)


@pytest.mark.parametrize("kind", ["positions", "answer"])
def test_consistency_does_not_depend_on_the_layout(kind: str) -> None:
    """A tree has one row for the prompt of all; value and gradient are those of padded rows."""
    student = make_student(2)
    problems = [make_problem(5, [9, 1, 12]), make_problem(6, [4, 4])]
    alpha = torch.tensor([0.2, 0.3, 0.5, 0.6, 0.4])
    found = []
    for layout in ("padded", "tree"):
        batch = build_batch(problems, layout=layout, leaves=False, pad_token_id=0)
        _, hidden, pass_ = run_pass(student, batch)
        term = consistency_loss(hidden, pass_, alpha, kind)
        student.model.zero_grad()
        term.backward()
        gradient = student.model.model.layers[0].mlp.down_proj.weight.grad
        found.append((term.detach(), gradient.clone()))
    for padded, tree in zip(*found, strict=True):
        torch.testing.assert_close(tree, padded, rtol=1e-4, atol=1e-6)
        assert padded.abs().max() > 1e-4


def test_dropout_makes_the_prompt_differ_between_rows() -> None:
    """Rows that repeat the prompt drop other inputs of it; the mean over it is not 0 then."""
    student = make_student(2)
    body = student.body
    body.embed_tokens = nn.Sequential(body.embed_tokens, nn.Dropout(0.2)).train()
    problem = make_problem(5, [9, 1, 12])
    alpha = torch.tensor([0.2, 0.3, 0.5])
    batch = build_batch([problem], layout="padded", leaves=False, pad_token_id=0)
    _, hidden, pass_ = run_pass(student, batch)
    got = consistency_loss(hidden, pass_, alpha, "positions")
    logp = (hidden @ student.weight.T).double().log_softmax(-1)
    want = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = (batch.main.attention_mask[i] * batch.main.attention_mask[j]).bool()
        p, q = logp[i][both], logp[j][both]
        assert len(p) == 5 + min((9, 1, 12)[i], (9, 1, 12)[j])
        want += alpha[i] * alpha[j] * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    body.embed_tokens.eval()
    assert float(consistency_loss(hidden, pass_, alpha, "positions").detach()) < float(got.detach())
