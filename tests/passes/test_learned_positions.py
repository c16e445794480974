"""A student with a table of learned positions: within it every layout works, beyond it one line."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from compact.data import load_problems
from compact.lab.zoo import make_rows
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problems
from compact.passes.forward import check_ids, observe
from compact.student import Student, learned_positions
from compact.student.generation import generate

TOKENIZER = build_tokenizer()


def encoded() -> list[EncodedProblem]:
    problems = load_problems(make_rows(("good", "wrong-step", "verbose"), 4, seed=1))
    return list(encode_problems(problems, TOKENIZER, max_length=2560))


def student(positions: int) -> Student:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(TOKENIZER)}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=positions, **sizes))
    return Student.of(model.eval(), TOKENIZER)


def longest(problems: list[EncodedProblem], leaves: bool) -> int:
    return max(
        len(p.prompt_ids)
        + max(len(r.ids) for r in p.rationales)
        + leaves * (len(p.cue_ids) + len(p.gold_ids))
        for p in problems
    )


def test_a_row_of_a_tree_is_longer_than_the_table() -> None:
    """Each rationale fits, all of a problem together do not: tree and padded rows agree."""
    problems = encoded()
    small = student(longest(problems, leaves=True))
    assert max(sum(len(r.ids) for r in p.rationales) for p in problems) > small.config.n_positions
    tree, padded = (observe(small, problems, layout=name) for name in ("tree", "padded"))
    torch.testing.assert_close(tree.stats.nll, padded.stats.nll, rtol=1e-4, atol=1e-5)


def test_beyond_the_table_the_problem_is_named() -> None:
    problems = encoded()
    whole, alone = longest(problems, leaves=True), longest(problems, leaves=False)
    with pytest.raises(ValueError, match=rf"question_id .* have {whole} tokens, but .* learned"):
        check_ids(student(whole - 1), problems)
    check_ids(student(alone), problems, leaves=False)
    most = f"max_length must be at most {alone - 1 - (whole - alone)}"
    with pytest.raises(ValueError, match=most):
        observe(student(alone - 1), problems)


def test_generation_stops_at_the_table() -> None:
    model = student(20).model
    assert len(generate(model, TOKENIZER, [[1, 2, 3]], 17)) == 1
    with pytest.raises(ValueError, match="max_new_tokens must be at most 17 with a prompt of 3"):
        generate(model, TOKENIZER, [[1, 2, 3]], 18)


def test_which_models_have_a_table() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(max_position_embeddings=40, vocab_size=99, **sizes))
    assert learned_positions(opt) == 40
    assert learned_positions(student(33).model) == 33
    assert learned_positions(build_model(TOKENIZER, seed=0, layers=1)) is None


def test_a_generation_config_does_not_change_answers() -> None:
    """A file beside the weights decides nothing, and is as before afterwards."""
    model = student(64).model
    wanted = generate(model, TOKENIZER, [[1, 2, 3]], 12)
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.suppress_tokens = wanted[0][:1]
    assert generate(model, TOKENIZER, [[1, 2, 3]], 12) == wanted
    assert model.generation_config.no_repeat_ngram_size == 1
