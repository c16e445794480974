"""Metrics against their formulas: gold-weighted, answer, probe; agreement by its order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compact.lab.zoo_student import build_tokenizer
from compact.metrics import get_metric
from compact.metrics.gain import final_level
from compact.metrics.probe import thinking_ids
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from helpers.toy import ThinkingWords, make_model, make_problem

_THINKING = (3, 11, 40)
_STUDENT = replace(
    Student.of(make_model("llama").eval()), processing_class=ThinkingWords(*_THINKING)
)


def told(seed: int, texts: list[list[str]], answers: list[str | None]) -> EncodedProblem:
    """A problem of random tokens whose steps read as given."""
    problem = make_problem(seed, [3 + 2 * max(map(len, texts))] * len(texts))
    rationales = tuple(
        replace(
            r,
            steps=tuple((2 * i, 2 * i + 2) for i in range(len(mine))),
            step_texts=tuple(mine),
            text=" ".join(mine),
            spaced=(False,) * len(mine),
            marker=2 * len(mine),
            answer=answer,
        )
        for r, mine, answer in zip(problem.rationales, texts, answers, strict=True)
    )
    return replace(problem, rationales=rationales, gold="7", prompt="Mia has 3 and gets 4.")


def a_pass(problems: list[EncodedProblem]) -> Pass:
    """A pass with answer leaves."""
    batch = build_batch(problems, layout="tree", leaves=True, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def test_answer_is_the_vote() -> None:
    """Shares of K; one without an answer has its own vote only."""
    texts = [["hence"]] * 5
    found = a_pass([told(1, texts, ["7", "8", "7", None, None]), told(2, texts[:1], ["7"])])
    assert get_metric("answer").score(found).tolist() == pytest.approx([0.4, 0.2, 0.4, 0.2, 0.2, 1])


def test_agreement_is_read_from_the_judgements() -> None:
    """The rationales of the right answer count; the majority of three is wrong and loses."""
    texts = [["3 + 4 = 7"], ["4 + 3 = 7"], ["3 + 5 = 8"], ["3 + 5 = 8"], ["3 + 5 = 8"]]
    score = get_metric("agreement").score(a_pass([told(1, texts, ["7", "7", "8", "8", "8"])]))
    assert score[0] == score[1] > score[2] == score[3] == score[4]


def test_gold_weighted_equals_its_formula() -> None:
    """Cosines of the states before the answer, weighted by softmax of I_n, written out."""
    problem = make_problem(4, [8, 12, 9])
    found = a_pass([problem])
    states, level = [], final_level(found).double().numpy()
    for r in problem.rationales:
        prefix = (*problem.prompt_ids, *r.ids[: r.steps[-1][1]], *problem.cue_ids)
        with torch.no_grad():
            out = _STUDENT.model(input_ids=torch.tensor([prefix]), output_hidden_states=True)
        state = out.hidden_states[-1][0, -1].double().numpy()
        states.append(state / np.linalg.norm(state))
    weight = np.exp(level - level.max())
    weight /= weight.sum()
    cosines = np.stack(states) @ np.stack(states).T
    wanted = cosines @ weight
    score = get_metric("gold-weighted").score(found)
    np.testing.assert_allclose(score, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["probe", "probe-raw"])
def test_probe_equals_its_formula(name: str) -> None:
    """Rises of the gold answer along the reasoning, at thinking words in full, else a tenth."""
    problem = make_problem(5, [7, 12])
    ids = (3, *problem.rationales[1].ids[1:4], 11, *problem.rationales[1].ids[5:])
    problem = replace(
        problem, rationales=(problem.rationales[0], replace(problem.rationales[1], ids=ids))
    )
    wanted = []
    for r in problem.rationales:
        with torch.no_grad():
            logits = (
                _STUDENT.model(input_ids=torch.tensor([[*problem.prompt_ids, *r.ids]]))
                .logits[0]
                .double()
            )
        values = logits if name == "probe-raw" else logits.log_softmax(-1)
        level = values[:, list(problem.gold_ids)].mean(1)[len(problem.prompt_ids) - 1 :]
        wanted.append(
            sum(
                (1.0 if r.ids[t] in _THINKING else 0.1) * max(float(level[t + 1] - level[t]), 0.0)
                for t in range(r.marker)
            )
        )
    np.testing.assert_allclose(get_metric(name).score(a_pass([problem])), wanted, atol=1e-5)


def test_thinking_words_of_one_token() -> None:
    """Bare or after a space; words of several tokens are left out."""
    tokenizer = build_tokenizer()
    found = {tokenizer.decode([i]) for i in thinking_ids(tokenizer).tolist()}
    assert {"Okay", "Hmm", "So", "However"} <= found
    assert all(word.strip()[:1].isupper() for word in found if word != "<unk>")
