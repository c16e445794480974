"""A model that cannot be loaded is refused at once, in one line that names it."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from compact.lab.zoo_student import build_tokenizer
from compact.student import load_student, smollm2_path
from helpers.toy import CONFIGS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete model."""
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(path: str | Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_student(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    return message


def test_a_complete_model_loads(folder: Path) -> None:
    model, tokenizer = load_student(folder)
    assert not model.training and tokenizer.pad_token_id is not None


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:900])
    assert "cannot be read as a model: SafetensorError" in refusal(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    edit(folder, hidden_size=64)
    assert "cannot be read as a model: RuntimeError" in refusal(folder)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    edit(folder, num_hidden_layers=3)
    assert "tensors are missing, such as model.layers.2" in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert "cannot be read as a model: OSError" in refusal(folder)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")
    assert "config.json: expected JSON, got Expecting property name" in refusal(folder)


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "cannot be read as a tokenizer" in refusal(folder)


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "empty: cannot be read as a model: " in message and "config.json" in message
    (tmp_path / "text.gguf").write_text("not a model")
    assert "GGUF" in refusal(tmp_path / "text.gguf")
    (tmp_path / "text.txt").write_text("not a model")
    assert "expected a folder, a .gguf file" in refusal(tmp_path / "text.txt")


@pytest.mark.parametrize("name", ["/nowhere/x", "./x", "x.gguf", "runs/a/b", "runs/x"])
def test_a_path_that_is_not_there_fails_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    start = time.monotonic()
    assert refusal(name) == f"{name}: no such file or folder"
    assert time.monotonic() - start < 1


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(self: object, name: str, timeout: float) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert refusal("some/name").endswith("no model of that name could be loaded (no route)")


def edit(folder: Path, **changes: int) -> None:
    """Changes the model's config."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_gguf_model_names_its_file() -> None:
    """So that a run that was given the loaded model says what its adapter belongs to."""
    path = smollm2_path()
    model, _ = load_student(path)
    assert model.config.name_or_path == str(path)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(path)


def test_revision_and_token_reach_every_request(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is asked for the model, its tokenizer and its weights with the same options."""
    options = {"revision": "abc", "token": "t", "cache_dir": str(tmp_path / "cache")}
    asked: list[tuple[str, dict[str, Any]]] = []

    def noting(what: str, found: Any) -> Any:
        def call(*_: Any, **given: Any) -> Any:
            asked.append((what, {name: given[name] for name in options if name in given}))
            return found

        return call

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", noting("cache", None))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", noting("info", None))
    for cls in (AutoTokenizer, AutoModelForCausalLM):
        found = cls.from_pretrained(str(folder))
        found = (found, {"missing_keys": []}) if cls is AutoModelForCausalLM else found
        monkeypatch.setattr(cls, "from_pretrained", noting(cls.__name__, found))
    load_student("org/name", **options)
    of_request = {"revision": "abc", "token": "t"}
    of_cache = {"revision": "abc", "cache_dir": options["cache_dir"]}
    assert [given for _, given in asked] == [of_cache, of_request, options, options]


def test_a_gguf_model_is_parsed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Parsing takes seconds; it is told how the weights can be kept."""
    import gguf

    read, parsed = gguf.GGUFReader.__init__, []

    def count(reader: gguf.GGUFReader, *args: object) -> None:
        parsed.append(args)
        read(reader, *args)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    with caplog.at_level("INFO", "compact"):
        load_student(smollm2_path())
    assert len(parsed) == 1
    assert "`compact export` keeps them as a folder" in caplog.text


def test_a_gguf_model_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"needs the package gguf: .* extra \[gguf\]"):
        load_student(tmp_path / "m.gguf")


HEADERS = {
    "empty": (b"", "got an empty file"),
    "cut": (b"GGUF\3\0\0\0", "expected 8 more bytes"),
    "version": (b"GGUF\x63\0\0\0" + bytes(16), "expected version 2 or 3, got 99"),
    "tensors": (struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0), "expected at most 65536 entries"),
    "keys": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60), "expected at most 65536 entries"),
    "long key": (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 62), "more bytes, got a file"),
    "long list": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 1 << 60),
        "more bytes, got a file",
    ),
    "many texts": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 60),
        "texts, got a file",
    ),
    "lists of lists": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1),
        "a list of numbers or texts, got type 9",
    ),
    "layers": (
        struct.pack("<4sIQQQ13sII", b"GGUF", 3, 0, 1, 13, b"a.block_count", 4, 10**9),
        "to be at most 4096, got 1000000000",
    ),
    "dimensions": (
        struct.pack("<4sIQQQ1sI", b"GGUF", 3, 1, 0, 1, b"t", 1 << 30),
        "a tensor of at most 4 dimensions",
    ),
    "far tensor": (
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 1, 0, 1, b"t", 0, 0, 1 << 40),
        "a tensor within the file",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_gguf_file_that_promises_too_much(tmp_path: Path, name: str) -> None:
    """Refused before the library reads it, which would loop for ever over some of them."""
    content, words = HEADERS[name]
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.thread_time()
    assert words in refusal(tmp_path / "m.gguf")
    assert time.thread_time() - start < 1
