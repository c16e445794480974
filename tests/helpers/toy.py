"""Tiny models and problems of random tokens, shared by tests."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes import EncodedProblem, EncodedRationale

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "qwen": Qwen2Config(**_SIZES),
    "gemma": Gemma2Config(**_SIZES, head_dim=8, sliding_window=256, query_pre_attn_scalar=8),
}


def make_model(kind: str, checkpointing: bool = False) -> nn.Module:
    """A tiny model with LoRA matrices that are not zero, so that all their gradients count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model: nn.Module = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
    return model


def save_student(folder: Path) -> None:
    """Saves an untrained student of one layer with the tokenizer of the zoo."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, hidden=32, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class ThinkingWords:
    """Stands for a tokenizer that writes every thinking word as one of the given tokens."""

    pad_token_id = eos_token_id = 0

    def __init__(self, *ids: int) -> None:
        self.ids, self.asked = ids, 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        self.asked += 1
        return {"input_ids": [self.ids[self.asked % len(self.ids)]]}


def make_problem(seed: int, lengths: list[int], prompt: int = 5, steps: int = 2) -> EncodedProblem:
    """A problem of random tokens; rationale k has lengths[k] tokens, cut into steps."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (count,), generator=g).tolist())

    rationales = []
    for k, length in enumerate(lengths):
        marker = max(length - 2, 1)
        cuts = sorted({max(1, marker * (i + 1) // steps) for i in range(steps)})
        spans = tuple(zip([0, *cuts[:-1]], cuts, strict=True))
        rationales.append(
            EncodedRationale(
                teacher=f"t{k}",
                text="",
                ids=ids(length),
                steps=spans,
                step_texts=("",) * len(spans),
                marker=marker,
                answer=None,
                spaced=(False,) * len(spans),
            )
        )
    cue = ids(3)
    prompt_ids, gold_ids = ids(prompt), ids(2)
    return EncodedProblem(
        question_id=f"q{seed}",
        prompt="",
        prompt_ids=prompt_ids,
        rationales=tuple(rationales),
        gold="",
        gold_ids=gold_ids,
        cue_ids=cue,
        spaced_cue_ids=cue,
        raw_gold_ids=ids(3),
    )
