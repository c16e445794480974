"""A tiny student that says something and stops, and `transformers serve` on loopback for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from compact.lab import zoo
from compact.lab.zoo_student import END, build_model, build_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
_QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def save_talking_student(folder: Path, steps: int = 60) -> None:
    """Saves a student of one layer that has learned four rationales, and a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = build_model(tokenizer, seed=0, hidden=32, layers=1)
    texts = [row["completion"] + END for row in zoo.make_rows(("good",), 4, seed=1)]
    batch = tokenizer(["\n" + text for text in texts], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.do_sample = True  # else `transformers serve` ignores the temperature
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """Serves a student while the context lasts; the base URL."""
    port = free_port()
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("transformers")), *words],
            stdout=output,
            stderr=output,
            env={**os.environ, **_QUIET},
        )
        try:
            deadline = time.monotonic() + 240
            while not _answers(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
