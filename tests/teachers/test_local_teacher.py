"""A model in this process as a teacher: where its texts end, and what they depend on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_prompt
from compact.student.generation import stop_ids
from compact.teachers import local
from compact.teachers.local import Local
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer

TOKENIZER = build_tokenizer()
PROMPT = "Tom has 3 apples"


def asked(folder: Path, *, sample: int = 0, **settings: Any) -> Answer:
    teacher = Teacher("here", local=str(folder), **settings)
    request = {**teacher.parameters(), "messages": [{"role": "user", "content": PROMPT}]}
    return asyncio.run(Local(teacher).ask(request, sample))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student of random weights; large ones, else it would repeat one token."""
    model = build_model(TOKENIZER, seed=0, layers=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(8.0 if "layers" in name and weight.ndim == 2 else 1.0)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_text_ends_where_the_positions_end(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": len(TOKENIZER)}
    GPT2LMHeadModel(GPT2Config(n_positions=24, **sizes)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    answer = asked(tmp_path, max_tokens=64, temperature=0)
    assert answer.finish == "length" and answer.completion_tokens == 24 - answer.prompt_tokens > 0


def test_any_end_token_ends_a_text_also_at_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a text is whole: it is not dropped as one that was cut."""
    cut = asked(folder, max_tokens=4, temperature=0)
    assert (cut.finish, cut.completion_tokens) == ("length", 4)
    model, _ = local._load(str(folder))
    ids = torch.tensor([encode_prompt(PROMPT, TOKENIZER)])
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    last = next(i for i, token in enumerate(written) if token not in written[:i] and i > 0)
    ends = [*stop_ids(model, TOKENIZER), written[last]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    whole = asked(folder, max_tokens=last + 1, temperature=0)
    assert (whole.finish, whole.completion_tokens) == ("stop", last + 1)
    assert whole.text == TOKENIZER.decode(written[:last]).strip()


def test_a_sample_is_that_of_its_number_and_top_p(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the random state of the process nor the model's generation config has a say."""
    settings: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0}
    state = torch.get_rng_state()
    first, other = (asked(folder, sample=i, **settings) for i in range(2))
    assert torch.equal(state, torch.get_rng_state()) and first.text != other.text
    model, _ = local._load(str(folder))
    for name, value in (("top_k", 1), ("repetition_penalty", 9.0), ("min_new_tokens", 9)):
        monkeypatch.setattr(model.generation_config, name, value)
    assert asked(folder, **settings) == first
    greedy = asked(folder, max_tokens=16, temperature=0)
    assert asked(folder, top_p=1e-6, **settings).text == greedy.text != first.text


def test_without_a_limit_it_writes_the_most_that_is_documented(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local._MOST_TOKENS == 1024
    monkeypatch.setattr(local, "_MOST_TOKENS", 30)
    assert asked(folder, max_tokens=None, temperature=0).completion_tokens == 30
