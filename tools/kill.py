"""Kills commands at random moments and checks that the next start gives the undisturbed result.

    python tools/kill.py [--times 50] [--seed 0]

Each time one command of train (every weight and LoRA, several presets), score, evaluate and compare
gets SIGKILL after a random share of the time that it takes undisturbed, then is started again as
its message or its help says. The results must be equal bit for bit: weights of the student, log of
scores, rows, accuracies. Prints one line a time, and exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer.runlog import read_scores

ROOT = Path(__file__).parents[1]
TRAIN = (
    "train --model {place}/student --data {place}/data.jsonl --output_dir {out} --max_steps 8 "
    "--save_steps 2 --learning_rate 1e-3 --max_length 400 --use_cpu --report_to none --seed 3 "
)
VOLATILE = {"seconds", "command", "mean_seconds"}


class Case(NamedTuple):
    """A command line, and what its result is made of."""

    words: str
    result: Callable[[Path], str]


def of_training(out: Path) -> str:
    """Returns the SHA-256 of the student's weights and of the log of scores."""
    found = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        found.update(file.read_bytes())
    found.update(json.dumps(read_scores(out).to_pylist()).encode())
    return found.hexdigest()


def of_rows(out: Path) -> str:
    """Returns the SHA-256 of a file of rows, in the order of their ids, or of OUT/compare.json."""
    if out.is_dir():
        rows = [json.loads((out / "compare.json").read_text())]
    else:
        rows = sorted(map(json.loads, out.read_text().splitlines()), key=json.dumps)
    return hashlib.sha256(json.dumps(_stable(rows)).encode()).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in sorted(value.items()) if k not in VOLATILE}
    return [_stable(v) for v in value] if isinstance(value, list) else value


CASES = {
    "train, every weight, robust": Case(TRAIN + "--use_peft false --preset robust", of_training),
    "train, every weight, paper": Case(TRAIN + "--use_peft false --preset paper", of_training),
    "train, LoRA, uniform": Case(TRAIN + "--preset uniform", of_training),
    "train, LoRA, robust": Case(TRAIN + "--preset robust --leaf_every 2", of_training),
    "score": Case("score {place}/data.jsonl --model {place}/student --out {out}", of_rows),
    "evaluate": Case(
        "evaluate --model {place}/student --data {place}/data.jsonl --batch_size 2 "
        "--max_new_tokens 12 --out {out}",
        of_rows,
    ),
    "compare": Case(
        "compare {place}/data.jsonl --config {place}/recipe.yaml --test {place}/data.jsonl "
        "--limit 4 --arms uniform robust --seeds 0 1 --tokens 2000 --out {out}",
        of_rows,
    ),
}


def prepare(place: Path) -> None:
    """Writes a tiny student, data of the teacher zoo, and a recipe."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, hidden=32, layers=1).save_pretrained(place / "student")
    tokenizer.save_pretrained(place / "student")
    rows = zoo.make_rows(("good", "verbose", "wrong-step"), 12, seed=1)
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "recipe.yaml").write_text(
        f"model: {place}/student\nmax_length: 400\nuse_cpu: true\nlearning_rate: 1.0e-3\n"
    )


def start(case: Case, place: Path, out: Path) -> subprocess.Popen[bytes]:
    """Starts a command; a training run with a whole checkpoint is resumed."""
    words = case.words.format(place=place, out=out).split()
    if words[0] == "train" and list(out.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "true"]
    log = (place / "log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "compact", *words],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(case: Case, place: Path, out: Path) -> str:
    """Runs a command to its end; returns its result."""
    status = start(case, place, out).wait()
    if status:
        sys.exit(f"{case.words.split()[0]} failed with {status}: {place / 'log'}")
    return case.result(out)


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=50, metavar="N", help="[50]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="compact-kill-"))
    prepare(place)
    expected: dict[str, tuple[str, float]] = {}
    names = list(CASES)
    for time_ in range(options.times):
        name = names[time_ % len(names)]
        case = CASES[name]
        if name not in expected:
            began = time.monotonic()
            result = finish(case, place, place / f"whole-{names.index(name)}")
            expected[name] = result, time.monotonic() - began
        result, seconds = expected[name]
        out = place / f"killed-{time_}"
        moment = rng.uniform(0.0, seconds)
        process = start(case, place, out)
        try:
            process.wait(moment)
            how = "had ended"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            how = "killed"
        again = result if how == "had ended" and case.result(out) == result else None
        same = (again or finish(case, place, out)) == result
        done = f"[{time_ + 1}/{options.times}]"
        told = f"{how} after {moment:.1f} of {seconds:.1f} s"
        print(f"{done} {name}: {told}, equal: {same}", flush=True)
        if not same:
            sys.exit(f"the result differs: {out}")
    print(f"{options.times} results equal bit for bit")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
