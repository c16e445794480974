"""`compact doctor` predicts what a pass needs, and its advice works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config

from compact.commands import doctor as command
from compact.commands.cli import main
from compact.evaluation import doctor
from compact.evaluation.doctor import _bytes, describe, kept_bytes, needs
from compact.passes.layout import choose_layout
from compact.student import Student
from helpers.toy import _SIZES, CONFIGS, make_model, save_student


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_kept_bytes_grow_with_the_tokens(kind: str) -> None:
    """Linear, so two short passes give the bytes for many tokens."""
    student = Student.of(make_model(kind).train())
    short, middle, long = (kept_bytes(student, n) for n in (32, 96, 224))
    assert 0 < short < middle
    assert long == pytest.approx(middle + 2 * (middle - short), rel=0.15)


def test_what_lora_needs_is_less_than_what_full_training_needs() -> None:
    lora = Student.of(make_model("llama").train())
    text = needs(lora, 64)
    trained = sum(p.numel() for p in lora.model.parameters() if p.requires_grad)
    assert text.startswith(f"{trained:,} weights, {_bytes(12 * trained)} for")
    assert "head: frozen, 2 matrix products" in text
    full = Student.of(AutoModelForCausalLM.from_config(CONFIGS["llama"]).train())
    assert "head: stash, 3 matrix products" in needs(full, 64)
    # At least what each layer's attention reads and gives, and gate and up: all float32.
    config = lora.config
    attention = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    a_token = attention * config.head_dim + 2 * config.intermediate_size
    least = 4 * (64 - 32) * config.num_hidden_layers * a_token
    assert least < kept_bytes(lora, 64) - kept_bytes(lora, 32)
    assert kept_bytes(lora, 64) < kept_bytes(full, 64)
    eager = "eager attention also keeps its scores"
    assert eager not in text and eager in needs(Student.of(make_model("gemma").train()), 64)


def test_advice_about_the_window_leads_to_a_tree() -> None:
    config = Gemma2Config(**_SIZES, head_dim=8, sliding_window=100)
    student = Student.of(AutoModelForCausalLM.from_config(config).eval())
    lines = list(describe(student, 200))
    assert any(line.startswith("layout        padded") for line in lines)
    (advice,) = (line for line in lines if "--max_length" in line)
    assert "--max_length 68 or less" in advice
    assert choose_layout(student, "auto", 68)[0] == "tree"
    assert choose_layout(student, "auto", 69)[0] == "padded"


def test_bytes_in_words() -> None:
    found = [_bytes(n) for n in (12, 1500, 537_600_000, 1_610_000_000)]
    assert found == ["12 bytes", "1.5 kB", "538 MB", "1.61 GB"]


@pytest.mark.parametrize(
    ("there", "share", "words"),
    [
        (False, 0.1, "float32; this processor has no instructions for bfloat16"),
        (
            True,
            0.31,
            "bf16: true with use_cpu: true is recommended; a product takes 0.31 of its time in "
            "float32",
        ),
        (True, 0.95, "float32; a product in bfloat16 takes 0.95 of its time here"),
    ],
)
def test_bfloat16_is_recommended_where_it_is_faster(
    there: bool, share: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "has_bf16_products", lambda: there)
    monkeypatch.setattr(doctor, "bf16_share", lambda weight: share)
    student = Student.of(make_model("llama"))
    assert doctor.precision(student) == words
    lines = list(describe(student, 128))
    assert f"precision     {words}" in lines and "device        cpu" in lines


def test_the_student_is_looked_at_where_it_would_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU if there is one; one that does not fit is looked at on the CPU, and told."""
    save_student(tmp_path)
    asked = []

    def load_model(name: str) -> None:
        asked.append(name)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "load_model", load_model)
    assert main(["doctor", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert asked == [str(tmp_path)]
    assert told.startswith("the student in float32 does not fit on the GPU; what follows is of the")
    assert "device        cpu" in told and "(the process may grow by up to 1.5 times" in told


def test_the_share_of_bfloat16_is_measured() -> None:
    assert 0.0 < doctor.bf16_share(torch.ones(64, 32)) < 1000.0
