"""The `released` preset against an independent transcription of its formulas in numpy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compact.commands.recipe import read_settings
from compact.config import CompactConfig
from compact.data import load_problems
from compact.evaluation.score import score_problems
from compact.metrics.probe import THINKING_WORDS
from compact.passes.encode import encode_problem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.passes.segments import segment_mean
from compact.student import Student
from compact.trainer import CompactTrainer
from compact.weighting import make_weigher
from compact.weighting.consistency import consistency_loss
from helpers.toy import CONFIGS, ThinkingWords, make_problem

THINKING = (3, 11, 40, 77, 90)
BETA, LAMBDA = (1.0, 1.0, 0.5), 0.1


def make_student(key_value_heads: int, tokenizer: PreTrainedTokenizerBase | None = None) -> Student:
    """A tiny Llama; fewer key-value heads than 4 make its attention grouped."""
    torch.manual_seed(1)
    changes = {"num_key_value_heads": key_value_heads}
    if tokenizer is not None:
        changes["vocab_size"] = len(tokenizer)
    config = type(CONFIGS["llama"])(**CONFIGS["llama"].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # wider than the usual start, so that scores differ
        parameter.data.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return Student.of(model, tokenizer or ThinkingWords(*THINKING))


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Row-wise, in float64."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def transcription(
    student: Student,
    rows: Sequence[Sequence[int]],
    prompt: int,
    gold: Sequence[int],
    thinking: Collection[int] = THINKING,
) -> tuple[np.ndarray, float]:
    """Weights [K] and loss of one problem, from full logits of K padded rows.

    Args:
        student: the student.
        rows: the tokens of prompt and rationale.
        prompt: the length of the prompt; every token after it is a label.
        gold: the tokens of the gold answer.
        thinking: the thinking words.
    """
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), student.pad_token_id, dtype=np.int64)
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
        level = logits[k][:, list(gold)].mean(axis=1)
        score = 0.0
        for t in range(1, longest):
            factor = 1.0 if int(ids[k, t]) in thinking else 0.1
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
    batch = build_batch(problems, layout="padded", leaves=weigher.needs.leaves, pad_token_id=0)
    live, hidden, pass_ = run_pass(student, batch)
    weights = weigher(pass_).weight
    wanted = [
        transcription(
            student,
            [problem.prompt_ids + r.ids for r in problem.rationales],
            len(problem.prompt_ids),
            problem.raw_gold_ids,
        )
        for problem in problems
    ]
    np.testing.assert_allclose(weights, np.concatenate([w for w, _ in wanted]), atol=1e-4)
    if len(lengths) > 1:
        assert float(weights.std()) > 0.02  # the scores do tell rationales apart

    nll = segment_mean(live.nll, batch.token_offsets)
    assert weigher.consistency is not None
    term = consistency_loss(hidden, pass_, weights, weigher.consistency.kind)
    loss = (weights * nll).sum() + weigher.consistency.factor * term
    assert float(loss.detach()) == pytest.approx(sum(value for _, value in wanted), abs=1e-4)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = {
    "brief": "26 - 10 = 16. The answer is 16",
    "long": "Let us see. Marco has 26 pears. But he gives 10 away, so 26 - 10 = 16 pears are left. "
    "Therefore 16 pears are left.\nThe answer is 16",
    "wrong": "Note that he gets 10 more. Thus 26 + 10 = 36. The answer is 36",
    "lines": "First, 26 pears.\nSecond, 10 pears go.\nSo 26 - 10 = 16.\n\n#### 16",
}
QUESTIONS = {"Marco has 26 pears and gives 10 away. How many are left?": "16", "26 - 10": "16.0"}


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 360 tokens with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [*TEXTS.values(), *QUESTIONS, *(f"{w} {w}" for w in ("So", "Let", "16"))] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def rows_of(teachers: Sequence[str]) -> list[dict[str, str]]:
    """Both questions, with the rationales of the teachers."""
    return [
        {"question_id": q, "prompt": q, "teacher": t, "completion": TEXTS[t], "answer": answer}
        for q, answer in QUESTIONS.items()
        for t in teachers
    ]


def from_text(
    student: Student, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], length: int
) -> list[tuple[np.ndarray, float]]:
    """The transcription of every problem, from the rows' text and the tokenizer alone."""
    forms = [space + word for word in THINKING_WORDS for space in ("", " ")]
    words = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
    thinking = {ids[0] for ids in words if len(ids) == 1}
    assert len(thinking) >= 4
    found = []
    for question in QUESTIONS:
        mine = [row for row in rows if row["question_id"] == question]
        asked = [{"role": "user", "content": question}]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = []
        for row in mine:
            said = [*asked, {"role": "assistant", "content": row["completion"]}]
            text = tokenizer.apply_chat_template(said, tokenize=False)
            assert text.endswith("<|im_end|>\n")
            whole.append(tokenizer(text, add_special_tokens=False).input_ids[:length])
        prompt = len(tokenizer(before, add_special_tokens=False).input_ids)
        gold = tokenizer(mine[0]["answer"], add_special_tokens=False).input_ids
        found.append(transcription(student, whole, prompt, gold, thinking))
    return found


# 48 tokens cut "long" and "lines" short, and take from "wrong" the newline after its end of turn.
@pytest.mark.parametrize("length", [2560, 48])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_released_equals_its_transcription_from_text(
    count: int, length: int, tmp_path: Path
) -> None:
    """Rows of text with ChatML give the weights and the loss of a training step, to 1e-4."""
    tokenizer = chatml_tokenizer()
    student = make_student(2, tokenizer)
    rows = rows_of(list(TEXTS)[:count])
    wanted = from_text(student, tokenizer, rows, length)
    weights = np.concatenate([weight for weight, _ in wanted])
    problems = load_problems(rows)

    def ours(**overrides: bool) -> np.ndarray:
        weigher = make_weigher("released", **overrides)
        encoded = [
            encode_problem(p, tokenizer, max_length=length, keep_tail=weigher.keep_tail)
            for p in problems
        ]
        batch = build_batch(
            encoded, layout="padded", leaves=False, pad_token_id=student.pad_token_id
        )
        return weigher(run_pass(student, batch)[2]).weight.numpy()

    np.testing.assert_allclose(ours(), weights, atol=1e-4)
    if count > 2 and length == 2560:  # the tail matters
        assert np.abs(ours(keep_tail=False) - weights).max() > 1e-2

    config = CompactConfig(
        output_dir=str(tmp_path),
        preset="released",
        weight_decay=0.01,
        max_length=length,
        use_cpu=True,
        report_to="none",
    )
    trainer = CompactTrainer(student.model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    items = [trainer.train_dataset[i] for i in range(len(problems))]
    loss, records = trainer.compute_loss(trainer.model, items, return_outputs=True)
    trained = [weight for record in records for weight in record.weight]
    np.testing.assert_allclose(trained, weights, atol=1e-4)
    assert float(loss.detach()) == pytest.approx(np.mean([v for _, v in wanted]), abs=1e-4)

    student.model.eval()
    weigher = make_weigher("released")
    scored = score_problems(student, tokenizer, problems, weigher, max_length=length)
    np.testing.assert_allclose([row["weight"] for row in scored], weights, atol=1e-4)


def test_the_gold_answer_is_tokenised_alone() -> None:
    """After the cue, the answer has a token for its space, which the public code does not read."""
    tokenizer = chatml_tokenizer()
    (problem, _) = load_problems(rows_of(["brief"]))
    encoded = encode_problem(problem, tokenizer, max_length=2560)
    assert tokenizer.decode(encoded.raw_gold_ids) == "16"
    assert tokenizer.decode(encoded.gold_ids) == " 16"


def test_the_recipe_has_the_weight_decay_of_the_public_code(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    recipe, config = read_settings(Path(__file__).parents[2] / "recipes/released.yaml", [])
    assert (config.preset, config.weight_decay, config.learning_rate) == ("released", 0.01, 1e-5)
    assert (recipe.dtype, recipe.use_peft) == ("float32", True)
    tokenizer = chatml_tokenizer()
    for decay, told in ((0.01, False), (0.0, True)):
        caplog.clear()
        settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
        CompactTrainer(
            make_student(2, tokenizer).model,
            CompactConfig(preset="released", weight_decay=decay, **settings),
            processing_class=tokenizer,
        )
        assert ("the public training code has weight_decay 0.01" in caplog.text) == told


def test_released_asks_for_padded_rows() -> None:
    """Padding is part of its formula, so a tree is refused with a reason."""
    student = make_student(2)
    weigher = make_weigher("released")
    assert weigher.needs.padded
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
