"""Where an answer ends, which tokens are special, and what a chat template may refuse."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from compact.lab.zoo_student import build_model, build_tokenizer
from compact.student import chat
from compact.student.chat import answer_end, render, special_ids
from compact.student.generation import generate, keep_stop_ids, stop_ids
from helpers.templates import CHATML, byte_tokenizer


def test_an_answer_ends_where_the_template_ends_it() -> None:
    tokenizer = byte_tokenizer()
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_end(tokenizer) == turn_end != tokenizer.eos_token_id
    tokenizer.chat_template = None
    assert answer_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert answer_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert answer_end(tokenizer) == tokenizer.eos_token_id


def test_a_student_stops_there_and_says_so_to_other_tools(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = build_model(tokenizer, seed=0, hidden=32, layers=1).eval()
    with torch.no_grad():  # the end of turn is the likeliest token everywhere
        model.get_input_embeddings().weight.zero_()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
        model.lm_head.bias[turn_end] = 9.0
    assert generate(model, tokenizer, [[3, 4]], 5) == [[]]
    assert stop_ids(model, tokenizer) == sorted({tokenizer.eos_token_id, turn_end})
    keep_stop_ids(model, tokenizer)
    model.generation_config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == stop_ids(model, tokenizer)


def test_one_stop_stays_one_number() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0, hidden=32, layers=1)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    keep_stop_ids(model, tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_added_tokens_without_a_role_are_special() -> None:
    tokenizer = byte_tokenizer(CHATML, "<end_of_turn>")
    own = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert own not in tokenizer.all_special_ids and own in special_ids(tokenizer)
    tokenizer.add_tokens(["wordlike"])
    assert tokenizer.convert_tokens_to_ids("wordlike") not in special_ids(tokenizer)


def test_the_token_of_unknown_text_is_not_special() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.unk_token_id not in special_ids(tokenizer)
    tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2
    assert tokenizer.eos_token_id in special_ids(tokenizer)


def test_a_refusal_is_one_line() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    message = "the chat template refuses these messages: System role not supported"
    with pytest.raises(ValueError, match=message):
        render([{"role": "system", "content": "x"}], tokenizer, generation_prompt=True)


def test_todays_date_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "x"}]
    chat._tell_of_date.cache_clear()
    with caplog.at_level(logging.WARNING):
        render(messages, tokenizer, generation_prompt=True)
        assert not caplog.records
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
        render(messages, tokenizer, generation_prompt=True)
        render(messages, tokenizer, generation_prompt=True)
    (record,) = caplog.records
    assert "writes today's date" in record.message


def test_padding_without_an_embedding() -> None:
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= rows
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_attention_heads=2, **sizes)).eval()
    prompts = [[3, 4, 5, 6], [3, 4]]
    together = generate(model, tokenizer, prompts, 3)
    assert together == [generate(model, tokenizer, [prompt], 3)[0] for prompt in prompts]
