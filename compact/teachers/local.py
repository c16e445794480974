"""A transformers model in this process as a teacher: no server and no key.

One answer at a time. For many questions a server that batches is faster.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from compact.passes.encode import encode_prompt
from compact.student import load_model
from compact.student.generation import generate_in_room, rooms
from compact.teachers.spec import Teacher
from compact.teachers.store import Answer, request_key

_load = lru_cache(maxsize=2)(load_model)
_MOST_TOKENS = 1024
"""Most tokens of an answer of a teacher with `max_tokens: null`; some models never end one."""
_WRITER = ThreadPoolExecutor(1)
"""One thread for all teachers: `generate` sets the mode of the model, which they may share."""


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
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_WRITER, self._generate, request, sample)

    async def close(self) -> None:
        """Does nothing: the model stays for other teachers."""

    def _generate(self, request: dict[str, Any], sample: int) -> Answer:
        model, processing_class = self._model, self._processing_class
        messages = request["messages"]
        plain = processing_class.chat_template is None
        prompt = "\n\n".join(m["content"] for m in messages) if plain else messages
        ids = encode_prompt(prompt, processing_class)
        (room,) = rooms(model, [ids], self._most)
        (written,) = generate_in_room(
            model,
            processing_class,
            [ids],
            self._most,
            temperature=request.get("temperature", 1.0),
            top_p=request.get("top_p", 1.0),
            seeds=[int(request_key(request, sample)[:15], 16)],
        )
        text = str(processing_class.decode(written, skip_special_tokens=True)).strip()
        ended = len(written) < room  # by an end token, which is not among them
        finish = "stop" if ended else "length"
        return Answer(text, "", finish, "", len(ids), len(written) + ended)
