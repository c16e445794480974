"""`compact export`: a folder that says what the student with its adapter says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compact.commands.cli import main
from compact.student import load_student
from helpers.commands import fails
from helpers.toy import save_student


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A student and, beside it, an adapter whose matrices are not zero."""
    save_student(tmp_path / "student")
    model, tokenizer = load_student(tmp_path / "student")
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_folder_is_the_student_with_its_adapter(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", "--model", str(adapter), "--out", str(out)]) == 0
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = load_student(adapter)[0](ids).logits
        base = load_student(tmp_path / "student")[0](ids).logits
        found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert torch.allclose(found, want, atol=1e-5) and not torch.allclose(found, base, atol=1e-3)
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out)("Ann")["input_ids"]
    card = (out / "README.md").read_text()
    assert f"Exported from {str(tmp_path / 'student').replace('_', chr(92) + '_')}." in card
    assert "adapter is merged" in card and "licences" in card


def test_the_dtype(adapter: Path, tmp_path: Path) -> None:
    words = ["--model", str(tmp_path / "student"), "--adapter", str(adapter)]
    assert main(["export", *words, "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_folder_with_files_is_left_alone(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "export", "--model", str(adapter), "--out", str(tmp_path / "student"))
    assert "--out must be a new or empty folder" in line
