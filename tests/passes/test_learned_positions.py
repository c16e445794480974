"""A student with a table of learned positions: within it every layout works, beyond it one line."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from compact.data import load_problems
from compact.lab.zoo import make_rows
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem
from compact.passes.encode import encode_problems
from compact.passes.forward import check_ids, check_positions, observe
from compact.student import Student, learned_positions
from compact.student.generation import generate
from helpers.toy import make_problem

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


def steady(kind: str) -> Student:
    """A student of rotary positions that change beyond 64 tokens, for longrope and dynamic."""
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    if kind != "dynamic":
        rope |= {"original_max_position_embeddings": 64}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    most = 64 if kind == "dynamic" else 256
    config = LlamaConfig(
        vocab_size=97,
        num_attention_heads=4,
        max_position_embeddings=most,
        rope_parameters=rope,
        **sizes,
    )
    torch.manual_seed(0)
    return Student.of(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_positions_that_change_with_the_longest_text(kind: str) -> None:
    """A long text would change how the others of its batch are read."""
    found = steady(kind)
    assert found.steady_positions == 64
    check_positions(found, 54, room=10)
    with pytest.raises(
        ValueError, match="max_length must be at most 54, got 55; .* than 64 tokens"
    ):
        check_positions(found, 55, room=10)
    short, long = make_problem(1, [30, 9]), make_problem(2, [80, 9])
    alone = observe(found, [short], layout="padded").stats.nll
    with pytest.raises(ValueError, match="question_id .* rotary positions .* at most"):
        observe(found, [short, long], layout="padded")
    torch.testing.assert_close(observe(found, [short], layout="padded").stats.nll, alone)


def test_other_rotary_positions_have_no_such_limit() -> None:
    found = steady("yarn")
    assert found.steady_positions is None
    check_positions(found, 500, room=10)
    observe(found, [make_problem(2, [80, 9])])


def test_rotary_positions_of_each_layer_type() -> None:
    found = steady("yarn")
    long = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    both = {"full_attention": long, "sliding_attention": {"rope_type": "default"}}
    own = replace(found, config=SimpleNamespace(rope_parameters=both))
    assert own.steady_positions == 32
