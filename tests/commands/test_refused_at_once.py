"""What needs no model is refused before torch loads, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from compact.lab import zoo

# Command line -> words of the error. Names with an extension or a final / lie in the test's folder.
REFUSED = {
    "train --config gone.yaml": "gone.yaml: no such file",
    "train --config mine.txt": "mine.txt: expected `key: value` lines",
    "train --model m --data gone.jsonl --output_dir new/": "gone.jsonl: no such file",
    "train --model m --data bad.jsonl --output_dir new/": "bad.jsonl:2: question_id",
    "train --model m --data data.jsonl --eval_data gone.jsonl --output_dir new/": "gone.jsonl",
    "train --model m --data data.jsonl --lora_r 0": "lora_r must be a whole number of at least 1",
    "train --model m --data data.jsonl --output_dir used/": "already holds checkpoint-4",
    "train --model m --data data.jsonl --output_dir used/ --num_processes 2": "already holds",
    "train --model used/ --data data.jsonl --output_dir used/": "another folder than the student's",
    "evaluate --model m --data gone.jsonl --out out.jsonl": "gone.jsonl: no such file",
    "evaluate --model m --data bad.jsonl --out out.jsonl": "bad.jsonl:2: question_id",
    "evaluate --model m --data data.jsonl --out data.jsonl": "another file than the input",
    "evaluate --model m --data data.jsonl --out out.jsonl --retained gone.txt": "gone.txt: no such",
    "evaluate --model m --data pair.jsonl --out out.jsonl --part 1/2": "--part must not be given",
    "evaluate --model m --data same.jsonl --out out.jsonl": "same.jsonl:1: chosen and rejected",
    "score gone.jsonl --model m --out out.jsonl": "gone.jsonl: no such file",
    "score bad.jsonl --model m --out out.jsonl": "bad.jsonl:2: question_id",
    "score data.jsonl --model m --out mine.txt": "mine.txt: exists, and compact did not make it",
    "import bad.jsonl --out out.jsonl": "bad.jsonl:2: field 'prompt'",
    "planted gone.jsonl --teachers a --out out.jsonl": "gone.jsonl: no such file",
}
SCRIPT = """
import contextlib, io, json, sys
from compact.commands.cli import main
for words in json.load(sys.stdin):
    found = io.StringIO()
    with contextlib.redirect_stderr(found):
        status = main(words)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([status, found.getvalue(), loaded]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """Command line -> exit status, standard error, and which slow libraries are loaded."""
    place = tmp_path_factory.mktemp("place")
    good = json.dumps(zoo.make_rows(("good",), 1, seed=0)[0]) + "\n"
    (place / "data.jsonl").write_text(good)
    (place / "bad.jsonl").write_text(good + '{"question_id": []}\n')
    pair = {"prompt": "2 + 3", "chosen": "5", "rejected": "6"}
    (place / "pair.jsonl").write_text(json.dumps(pair) + "\n")
    (place / "same.jsonl").write_text(json.dumps(pair | {"rejected": "5"}) + "\n")
    (place / "mine.txt").write_text("mine")
    (place / "used" / "checkpoint-4").mkdir(parents=True)

    def named(word: str) -> str:
        return str(place / word) if "." in word or word.endswith("/") else word

    lines = [[named(word) for word in line.split()] for line in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(REFUSED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", REFUSED)
def test_refused_before_torch_loads(answers: dict[str, list[object]], line: str) -> None:
    status, error, loaded = answers[line]
    assert (status, loaded) == (1, [])
    assert REFUSED[line] in str(error) and str(error).count("\n") == 1
