"""Builders: what stays as it is, what rows depend on, several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from compact.data import Problem, load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact.strategies import building, orion
from compact.strategies.orion import Orion
from compact.student.generation import generate

ROOT = Path(__file__).parents[2]
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m.get('reasoning_content') %}"
    "<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _chat_problems() -> list[Problem]:
    """Two rationales as chat messages; the reasoning is a field of its own."""
    rows = [
        {
            "question_id": "q",
            "teacher": teacher,
            "prompt": [{"role": "user", "content": "2 + 3"}],
            "completion": [
                {
                    "role": "assistant",
                    "content": "The answer is 5",
                    "reasoning_content": f"{words} 2 + 3 = 5.",
                }
            ],
            "answer": "5",
        }
        for teacher, words in (("a", "It is"), ("b", "We get"))
    ]
    return load_problems(rows)


def test_a_chat_that_stays_keeps_its_reasoning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer reads the reasoning too. What it does not rewrite, the student reads as before."""
    requests: list[str] = []
    module: Any = ModuleType("planted_writer")
    module.write = lambda asked: (
        requests.extend(asked) or ["The answer is 9", "Oh. The answer is 5"]
    )
    monkeypatch.setitem(sys.modules, "planted_writer", module)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    wrong = tokenizer("The answer is 8")["input_ids"]
    monkeypatch.setattr(orion, "generate_in_room", lambda m, t, p, *_, **__: [wrong] * len(p))
    problems = _chat_problems()
    strategy = Orion("planted_writer:write")
    strategy.folder = tmp_path
    model = build_model(tokenizer, 0, hidden=16, layers=1)
    for _ in range(2):  # built, and read from the file of rows
        (found,) = strategy.prepare(problems, model, tokenizer)
        assert found.rationales[0] == problems[0].rationales[0]
        assert found.rationales[1].completion == "Oh. The answer is 5"
        texts = [encode_problem(p, tokenizer, max_length=99).rationales[0].text for p in problems]
        assert texts[0].startswith("It is 2 + 3 = 5.")
    assert len(requests) == 2 and "It is 2 + 3 = 5.\nThe answer is 5" in requests[0]
    (row,) = map(json.loads, (tmp_path / "orion.jsonl").read_text().splitlines())
    assert row["completions"] == [None, "Oh. The answer is 5"]


def test_the_fingerprint_does_not_depend_on_threads() -> None:
    """It does depend on every bit, on names and on shapes."""
    torch.manual_seed(0)
    model, threads = nn.Linear(576, 4915, bias=False), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(building.fingerprint(model))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    with torch.no_grad():  # the same sum
        model.weight[0], model.weight[1] = model.weight[1].clone(), model.weight[0].clone()
    assert building.fingerprint(model) != found[0]
    scalar = nn.ParameterDict({"a": nn.Parameter(torch.ones((), dtype=torch.bfloat16))})
    other = nn.ParameterDict({"b": nn.Parameter(torch.ones((), dtype=torch.bfloat16))})
    assert building.fingerprint(scalar) != building.fingerprint(other)


# Both ranks wait for each other before they set up the group, whose timeout is 3 s.
_RANK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.data import load_problems
from compact.strategies.orion import Orion

class Slow(Orion):
    def build(self, problem, student):
        time.sleep(5)
        yield from ()
        return [None, f"written by {os.environ['RANK']}"], {"rationales": 2.0}

folder = Path(sys.argv[1])
(folder / f"ready-{os.environ['RANK']}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.05)
PartialState(cpu=True, timeout=timedelta(seconds=3))
rows = [{"question_id": "q", "prompt": "2 + 3", "teacher": teacher, "answer": "5",
         "completion": "The answer is 5"} for teacher in "ab"]
tokenizer = build_tokenizer()
strategy = Slow()
strategy.folder = folder
(found,) = strategy.prepare(
    load_problems(rows), build_model(tokenizer, 0, hidden=16, layers=1), tokenizer
)
(folder / f"rank-{os.environ['RANK']}").write_text(str(found.rationales[1].completion))
"""


def test_other_processes_wait_longer_than_a_barrier(tmp_path: Path) -> None:
    """The first builds for longer than the timeout of the group; the other gets its rows."""
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr.decode()[-3000:]
    finally:
        for process in ranks:
            process.kill()
    assert [(tmp_path / f"rank-{r}").read_text() for r in (0, 1)] == ["written by 0"] * 2


def test_a_negative_temperature_is_refused() -> None:
    """It would be greedy search."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0, hidden=16, layers=1)
    with pytest.raises(ValueError, match="temperature must be a number of at least 0, got -0.5"):
        generate(model, tokenizer, [[1, 2]], 2, temperature=-0.5)


def test_every_sample_needs_a_seed() -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0, hidden=16, layers=1)
    for seeds, got in ((None, "None"), ([1], "1")):
        with pytest.raises(ValueError, match=f"seeds must be one for each of 2 prompts, got {got}"):
            generate(model, tokenizer, [[1], [2]], 2, temperature=1.0, seeds=seeds)
