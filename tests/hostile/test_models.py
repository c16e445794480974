"""Folders of models and adapters that are hostile or damaged: one line, and no code runs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from compact.commands.cli import main
from compact.lab import zoo
from compact.student import load_student
from helpers.commands import fails
from helpers.toy import save_student


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and an adapter on it."""
    place = tmp_path_factory.mktemp("models")
    save_student(place / "student")
    model, tokenizer = load_student(place / "student")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(place / "adapter")
    tokenizer.save_pretrained(place / "adapter")
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    config = tmp_path / "copy" / "adapter" / "adapter_config.json"
    change(config, base_model_name_or_path=str(tmp_path / "copy" / "student"))
    return tmp_path / "copy"


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def first(tensors: dict[str, torch.Tensor], value: float) -> None:
    next(iter(tensors.values())).view(-1)[0] = value


CODE = "import pathlib; pathlib.Path(__file__).with_name('RAN').touch()\nclass X: pass\n"
AUTO = {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X", "AutoTokenizer": ["x.X", "x.X"]}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("answer", ["", "y\n" * 9, "n\n"])
def test_code_of_a_folder_does_not_run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    file: str,
    answer: str,
) -> None:
    """Whatever is on standard input; the message says how to allow it."""
    student = place / "student"
    (student / "x.py").write_text(CODE)
    (student / "custom_generate").mkdir()
    (student / "custom_generate" / "generate.py").write_text(CODE)
    other = {"model_type": "x"} if file == "config.json" else {"tokenizer_class": "X"}
    change(student / file, auto_map=AUTO, **other)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    line = fails(capsys, "doctor", str(student))
    assert "code of its own, which is not run" in line and "trust_remote_code" in line
    assert not list(place.rglob("RAN"))


STUDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a thousand million layers": (
        lambda d: change(d / "config.json", num_hidden_layers=10**9),
        "num_hidden_layers must be at most",
    ),
    "NaN": (
        lambda d: weights(d / "model.safetensors", lambda t: first(t, float("nan"))),
        "expected finite weights",
    ),
    "infinity": (
        lambda d: weights(d / "model.safetensors", lambda t: first(t, float("inf"))),
        "expected finite weights",
    ),
    "no tensor": (
        lambda d: weights(d / "model.safetensors", lambda t: t.pop(next(iter(t)))),
        "missing",
    ),
    "cut": (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:999]
        ),
        "cannot be read as a model",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot be read as a model"),
    "other sizes": (
        lambda d: change(d / "config.json", hidden_size=64),
        "cannot be read as a model",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "config is deep": (lambda d: (d / "config.json").write_text("[" * 9999), "nesting|JSON"),
    "tokenizer is a list": (
        lambda d: (d / "tokenizer.json").write_text("[]"),
        "cannot be read as a tokenizer",
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_bad_student(capsys: pytest.CaptureFixture[str], place: Path, name: str) -> None:
    import re

    damage, words = STUDENTS[name]
    damage(place / "student")
    line = fails(capsys, "doctor", str(place / "student"))
    assert re.search(words, line) and str(place / "student") in line, line


def test_a_tokenizer_of_another_model(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """More ids than rows of the embedding: an index error of torch before."""
    student, data = place / "student", place / "data.jsonl"
    rows = zoo.make_rows(("good",), 1, seed=0)
    data.write_text(json.dumps(rows[0]) + "\n")
    change(student / "config.json", vocab_size=9)
    weights(
        student / "model.safetensors",
        lambda t: t.update(
            {n: w[:9].clone() for n, w in t.items() if "embed" in n or "lm_head" in n}
        ),
    )
    change(student / "config.json", bos_token_id=0, eos_token_id=0, pad_token_id=0)
    out = ["--out", str(place / "out.jsonl")]
    for words in (
        ["score", str(data), "--model", str(student), *out],
        ["evaluate", "--data", str(data), "--model", str(student), *out],
        ["train", "--data", str(data), "--model", str(student), "--output_dir", str(place / "run")],
    ):
        words += ["--use_cpu", "--report_to=none"] if words[0] == "train" else []
        assert "embedding has 9 rows" in fails(capsys, *words)


ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
    "cut": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(
            (d / "adapter_model.safetensors").read_bytes()[:99]
        ),
        "cannot be read as an adapter",
    ),
    "other sizes": (lambda d: change(d / "adapter_config.json", r=3), "cannot be read as an"),
    "a tensor less": (
        lambda d: weights(d / "adapter_model.safetensors", lambda t: t.pop(next(iter(t)))),
        "missing adapter keys",
    ),
    "NaN": (
        lambda d: weights(d / "adapter_model.safetensors", lambda t: first(t, float("nan"))),
        "expected finite weights",
    ),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "expected a JSON object"),
    "no base": (
        lambda d: change(d / "adapter_config.json", base_model_name_or_path=None),
        "names no base model",
    ),
    "base is a number": (
        lambda d: change(d / "adapter_config.json", base_model_name_or_path=3),
        "expected base_model_name_or_path to be text or null",
    ),
    "no such kind": (
        lambda d: change(d / "adapter_config.json", peft_type="X"),
        "cannot be read as an adapter",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_adapter(capsys: pytest.CaptureFixture[str], place: Path, name: str) -> None:
    damage, words = ADAPTERS[name]
    damage(place / "adapter")
    line = fails(capsys, "doctor", str(place / "adapter"))
    assert words in line and str(place / "adapter") in line, line


def test_a_whole_adapter_is_described(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert main(["doctor", str(place / "adapter")]) == 0
    assert "LoRA, r = 16" in capsys.readouterr().out


def test_more_tokens_than_positions(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    """Without an end-of-text token, it would write for ever."""
    data = place / "data.jsonl"
    data.write_text(json.dumps(zoo.make_rows(("good",), 1, seed=0)[0]) + "\n")
    words = ["--model", str(place / "student"), "--data", str(data), "--out", str(place / "o")]
    line = fails(capsys, "evaluate", *words, "--max_new_tokens", "999999999999")
    assert "--max_new_tokens must be at most" in line and str(place / "student") in line


@pytest.mark.parametrize("what", ["student", "adapter"])
def test_train_does_not_write_over_its_student(
    capsys: pytest.CaptureFixture[str], place: Path, what: str
) -> None:
    """With the student's own folder, or its base model's, as output_dir."""
    data = place / "data.jsonl"
    data.write_text("{}")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    words = ["--model", str(place / what), "--data", str(data), "--use_cpu"]
    line = fails(capsys, "train", *words, "--output_dir", str(place / "student"))
    assert "output_dir" in line and str(place / "student") in line
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
