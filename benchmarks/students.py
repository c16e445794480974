"""Students that are measured or computed, and the losses of a step that cases share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Outputs
from compact.passes import EncodedProblem
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from compact.weighting import Weigher

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """A Llama-type student, from its published config.json. Times do not depend on the weights.

    Attributes:
        name: its published name.
        width: H, width of the hidden states.
        layers: n, number of layers.
        heads: number of attention heads; their size is width / heads.
        key_heads: number of heads of keys and values.
        inner: F, width inside the MLP.
        vocabulary: V.
    """

    name: str
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int

    @property
    def body(self) -> int:
        """N, the number of weights in the matrices of the layers; a token uses each once."""
        keys = self.width // self.heads * self.key_heads
        attention = 2 * self.width * self.width + 2 * self.width * keys
        return self.layers * (attention + 3 * self.width * self.inner)

    def config(self, vocabulary: int) -> Any:
        """Returns it as a LlamaConfig with another vocabulary."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_cache=False,
        )


SIZES = (
    Size("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152),
    Size("SmolLM2-360M", 960, 32, 15, 5, 2560, 49152),
    Size("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936),
    Size("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936),
    Size("Qwen2.5-3B", 2048, 36, 16, 2, 11008, 151936),
    Size("Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152064),
)


def size(name: str) -> Size:
    """Returns the size of that name.

    Raises:
        ValueError: for an unknown name; the message lists the names.
    """
    for one in SIZES:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in SIZES)
    raise ValueError(f"--shape: student must be one of {known}; got {name!r}")


def with_lora(model: Any) -> Any:
    """Returns the model in training mode with LoRA (r 16, alpha 32) on all linear layers.

    There is no dropout, so that providers agree.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LORA_TARGETS)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its initial 0 the gradient of lora_A would be 0 as well
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


def padded_rows(problems: Sequence[EncodedProblem], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids, attention mask and labels, each [rationales, L], padded as for SFT."""
    pairs = [(problem.prompt_ids, r.ids) for problem in problems for r in problem.rationales]
    rows = [torch.tensor(prompt + ids) for prompt, ids in pairs]
    stack = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = stack(rows, padding_value=pad)
    mask = stack([torch.ones_like(row) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (prompt, _) in zip(labels, pairs, strict=True):
        row[: len(prompt)] = -100
    return ids, mask, labels


def full_loss(model: Any, problems: Sequence[EncodedProblem], pad: int, weight: Tensor) -> Tensor:
    """The weighted loss from full logits of padded rows: the reference of the other providers.

    Args:
        model: the student.
        problems: the batch.
        pad: id of padding.
        weight: [rationales] share of each rationale's mean loss; they sum to 1 over the batch.
    """
    ids, mask, labels = padded_rows(problems, pad)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    target = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (weight * nll.view_as(target).sum(1) / (target != -100).sum(1)).sum()


def compact_loss(
    student: Student,
    problems: Sequence[EncodedProblem],
    weigher: Weigher,
    layout: Any,
    pad: int,
    leaves: bool,
) -> Tensor:
    """The loss of a batch as the trainer computes it: the mean over its problems."""
    layout = "padded" if weigher.needs.padded else layout
    batch = build_batch(problems, layout=layout, leaves=leaves, pad_token_id=pad)
    live, hidden, pass_ = run_pass(student, batch)
    weight = weigher(pass_).weight
    token_weight = (weight / batch.token_offsets.diff())[batch.rationale]
    loss = (token_weight * live.nll).sum()
    if weigher.consistency is not None:
        loss = loss + weigher.consistency(hidden, pass_, weight)
    return loss / len(problems)


def leaf_weights(
    student: Student, problems: Sequence[EncodedProblem], weigher: Weigher, layout: Any, pad: int
) -> Tensor:
    """The weights that `compact_loss` uses with answer leaves, for `full_loss`."""
    batch = build_batch(problems, layout=layout, leaves=True, pad_token_id=pad)
    with torch.no_grad():
        return weigher(run_pass(student, batch)[2]).weight / len(problems)


def outputs_of(loss: Tensor, model: Any) -> Outputs:
    """Returns the loss and two gradients, of an early lora_A and a late lora_B, to compare."""
    layers = model.base_model.model.model.layers
    return {
        "loss": loss.detach(),
        "early_grad": layers[1].self_attn.v_proj.lora_A["default"].weight.grad,
        "late_grad": layers[-2].mlp.down_proj.lora_B["default"].weight.grad,
    }


def backward(loss: Tensor, model: Any) -> Outputs:
    """Runs the backward; returns `outputs_of`."""
    loss.backward()
    return outputs_of(loss, model)


def reference(model: Any, loss_of: Callable[[], Tensor]) -> Callable[[], Outputs]:
    """Returns a function that gives the outputs of `loss_of`, computed when first asked for."""

    @functools.cache
    def expected() -> Outputs:
        model.zero_grad(set_to_none=True)
        found = backward(loss_of(), model)
        model.zero_grad(set_to_none=True)
        return found

    return expected
