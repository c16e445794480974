"""Models that a student cannot be made of are refused in one line before the first step."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from compact.lab.zoo_student import build_tokenizer
from compact.passes.forward import observe
from compact.student import Student
from helpers.toy import CONFIGS, make_problem


def test_an_activated_lora() -> None:
    """It is off in a body that is called without the model, so no weight would get a gradient."""
    lora: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    base = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model = get_peft_model(base, LoraConfig(alora_invocation_tokens=[5, 6], **lora))
    with pytest.raises(ValueError, match="adapter 'default' is an activated LoRA"):
        Student.of(model)


def test_a_decoder_that_is_the_last_layer() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    config = ModernBertDecoderConfig(**sizes, **ids, num_attention_heads=4, sep_token_id=2)
    model = ModernBertDecoderForCausalLM(config).eval()
    with pytest.raises(ValueError, match="hidden states of 32 .* Linear, which gives 97"):
        Student.of(model)


def test_an_encoder_that_needs_its_own_tokens() -> None:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_heads=4)).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration must run on token ids alone"):
        Student.of(model)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_padding_token_without_an_embedding(layout: Any) -> None:
    """No token sees padding, so token 0 takes its place."""
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    assert len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    student = Student.of(model, tokenizer)
    assert student.pad_token_id == 0
    found = observe(student, [make_problem(1, [9, 4]), make_problem(2, [3])], layout=layout)
    assert found.stats.nll.isfinite().all()
