"""A tokenizer that reads and writes every text exactly, for tests of chat templates."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML, *special: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes whose end of text is `<|endoftext|>`.

    Args:
        template: its chat template.
        special: special tokens without a role, besides those of ChatML; `all_special_ids` lacks
            them, as it lacks those of Gemma 3.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special])
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token=end, pad_token=end, chat_template=template
    )
