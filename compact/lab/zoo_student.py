"""Tiny students for the teacher zoo: a word tokenizer, a 0.2M-parameter Llama, three stages.

A student is trained from scratch on zoo texts. Some of the texts are wrong, as in the pretraining
data of a real student. The student is saved at three stages of training. Training takes minutes on
one core; later calls load the saved student.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from compact.lab import zoo
from compact.passes.encode import encode_prompt

STAGES = {"early": 300, "middle": 900, "late": 2400}
"""Steps of training at each stage."""
CACHE = Path("runs/zoo-students")
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for every word and number that a zoo teacher can write.

    Words are split as in GPT-2 (a word includes the space before it), so decoding is exact.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {PAD: 0, END: 1, UNKNOWN: 2}
    numbers = " ".join(map(str, range(100)))
    corpus = ["0 " + numbers, *(str(number) for number in range(100))]
    corpus += [f"{name} {name}" for name in zoo.NAMES] + list(zoo.NAMES)
    corpus += [zoo.with_filler(" ", random.Random(seed), 8) for seed in range(4)]
    for row in zoo.make_rows(tuple(zoo.TEACHERS), 400, seed=0):
        corpus += [row["prompt"], row["completion"] + "\n"]
    for text in corpus:
        for word, _ in split.pre_tokenize_str(text):
            words.setdefault(word, len(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, hidden: int = 64, layers: int = 4
) -> LlamaForCausalLM:
    """Returns a Llama with random weights: 0.21M parameters at the default size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _texts(seed: int) -> Iterator[tuple[str, str]]:
    """Yields (prompt, completion) without end.

    About a quarter are of teachers that err; a quarter of the right ones have their last steps cut.
    """
    rng = random.Random(f"texts {seed}")
    shares = {
        "good": 3,
        "style-shifted": 3,
        "friendly": 2,
        "verbose": 1,
        "filler": 0.5,
        "wrong-step": 2,
        "right-answer-wrong-steps": 1,
    }
    while True:
        story = zoo.make_story(rng)
        teacher = rng.choices(list(shares), list(shares.values()))[0]
        completion = zoo.TEACHERS[teacher](story, rng)
        if teacher in zoo.RIGHT and rng.random() < 0.25:
            *steps, answer = completion.split("\n")
            completion = "\n".join([*steps[: rng.randint(0, len(steps))], answer])
        yield story.question, completion


def _batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (input_ids, labels) [size, L] without end; a batch has texts of similar length."""
    texts = _texts(seed)
    while True:
        pairs = []
        for _ in range(8 * size):
            prompt, completion = next(texts)
            before = list(encode_prompt(prompt, tokenizer))
            pairs.append((len(before), before + tokenizer(completion + END)["input_ids"]))
        pairs.sort(key=lambda pair: len(pair[1]))
        starts = list(range(0, len(pairs), size))
        random.Random(len(pairs[0][1])).shuffle(starts)
        for start in starts:
            chunk = pairs[start : start + size]
            width = max(len(ids) for _, ids in chunk)
            ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
            labels = torch.full((len(chunk), width), -100)
            for row, (prompt_length, tokens) in enumerate(chunk):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
            yield ids, labels


def load_zoo_student(
    stage: str, seed: int = 0, *, cache: Path = CACHE
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns a student at a stage of training; trains it first if `cache` does not hold it.

    Args:
        stage: "early", "middle" or "late".
        seed: seed of the weights and of the texts.
        cache: folder of saved students, one folder per stage and seed. Training stops at `stage`
            and also saves the stages before it.

    Raises:
        ValueError: `stage` is none of the three.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: expected one of {sorted(STAGES)}, got {stage!r}")
    folder = cache / f"{stage}-{seed}"
    if not folder.exists():
        _train(seed, STAGES[stage], cache)
    model = LlamaForCausalLM.from_pretrained(folder)  # in evaluation mode
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def _train(seed: int, steps: int, cache: Path, *, size: int = 24, rate: float = 4e-3) -> None:
    """Trains for `steps` steps and saves the student at every stage it reaches."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    last = max(STAGES.values())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1 - 0.9 * step / last)
    )
    batches = _batches(tokenizer, seed, size)
    names = {steps: name for name, steps in STAGES.items()}
    cache.mkdir(parents=True, exist_ok=True)
    with tqdm(range(1, steps + 1), desc=f"zoo student {seed}", unit="step") as bar:
        for step in bar:
            ids, labels = next(batches)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if step in names:
                _keep(model, tokenizer, cache / f"{names[step]}-{seed}")


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves to a temporary folder next to `folder` and renames it, so `folder` is never partial."""
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if not folder.exists():
        beside.rename(folder)
