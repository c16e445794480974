"""Sizes of the students that are measured or computed; times do not depend on the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A Llama-type student, from its published config.json.

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
