"""A transformers model in this process as a teacher: no server and no key.

One answer at a time. For many questions a server that batches is faster.
"""

from __future__ import annotations

import asyncio
import threading
from functools import lru_cache
from typing import Any

import torch

from compact.passes.encode import encode_prompt
from compact.student import load_model
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, request_key

_load = lru_cache(maxsize=2)(load_model)
_MOST_TOKENS = 1024
_ONE = threading.Lock()
"""Held while an answer is written: the random numbers are those of the process."""


class Local:
    """A model in this process."""

    def __init__(self, teacher: Teacher) -> None:
        """Loads the model; teachers that share one load it once.

        Raises:
            FileNotFoundError, ValueError: it cannot be loaded.
        """
        assert teacher.local is not None
        self._model, self._processing_class = _load(teacher.local)
        self._most = teacher.most_tokens or _MOST_TOKENS

    async def ask(self, request: dict[str, Any], sample: int) -> Answer:
        """Returns a sample. It depends on the request and on the number of the sample only."""
        return await asyncio.to_thread(self._generate, request, sample)

    async def close(self) -> None:
        """Does nothing: the model stays for other teachers."""

    @torch.inference_mode()
    def _generate(self, request: dict[str, Any], sample: int) -> Answer:
        model, processing_class = self._model, self._processing_class
        messages = request["messages"]
        plain = processing_class.chat_template is None
        prompt = "\n\n".join(m["content"] for m in messages) if plain else messages
        ids = torch.tensor([encode_prompt(prompt, processing_class)], device=model.device)
        temperature = request.get("temperature", 1.0)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if temperature > 0:
            drawn = {"do_sample": True, "temperature": temperature, "top_p": request.get("top_p")}
        with _ONE, torch.random.fork_rng():
            torch.manual_seed(int(request_key(request, sample)[:15], 16))
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._most,
                pad_token_id=processing_class.pad_token_id,
                top_k=None,
                **drawn,
            )
        written = output[0, ids.shape[1] :]
        text = str(processing_class.decode(written, skip_special_tokens=True)).strip()
        ended = len(written) < self._most or written[-1].item() == processing_class.eos_token_id
        return Answer(text, "", "stop" if ended else "length", "", ids.shape[1], len(written))
