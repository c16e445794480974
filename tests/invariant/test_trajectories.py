"""Runs that must agree: classes of equivalent settings give one trajectory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compact.data import load_problems
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.passes.encode import encode_problem
from compact_ops import backend
from helpers.trajectories import TEACHERS, WEIGHED, rows_of, train


def assert_same(one: Any, two: Any, tolerance: float = 2e-5) -> None:
    """Compares two outcomes of `train`."""
    assert one[0] == pytest.approx(two[0], abs=1e-4)
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=tolerance)


def plain_loop(rows: list[dict[str, str]]) -> tuple[list[float], torch.Tensor]:
    """The two steps of `train` in plain torch: the mean over problems of the mean of K losses."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0, layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(2):
        terms = []
        for problem in load_problems(rows):
            encoded = encode_problem(problem, tokenizer, max_length=400)
            of_teachers = []
            for rationale in encoded.rationales:
                ids = torch.tensor([encoded.prompt_ids + rationale.ids])
                labels = ids.clone()
                labels[0, : len(encoded.prompt_ids)] = -100
                of_teachers.append(model(input_ids=ids, labels=labels).loss)
            terms.append(torch.stack(of_teachers).mean())
        loss = torch.stack(terms).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_teacher_is_plain_sft(tmp_path: Path) -> None:
    """With one teacher every preset is plain SFT with a mean over problems."""
    rows = rows_of("good")
    assert_same(plain_loop(rows), train(tmp_path, rows, preset="robust"))


def test_uniform_weights_are_the_mean_of_the_losses(tmp_path: Path) -> None:
    """Three teachers of equal weight: the mean of their three losses."""
    rows = rows_of(*TEACHERS)
    assert_same(plain_loop(rows), train(tmp_path, rows, preset="uniform"))


def test_identical_teachers_are_one(tmp_path: Path) -> None:
    """Three copies of a teacher train as the teacher alone does, whatever the weighting."""
    one = train(tmp_path / "one", rows_of("good"), **WEIGHED)
    three = train(tmp_path / "three", rows_of("good", "good", "good"), **WEIGHED)
    assert_same(one, three)


@pytest.mark.parametrize("weighing", [{"preset": "uniform"}, WEIGHED], ids=["uniform", "weighed"])
@pytest.mark.parametrize("batch,accumulation", [(1, 4), (2, 2)])
def test_any_split_into_micro_batches(
    tmp_path: Path, weighing: dict[str, Any], batch: int, accumulation: int
) -> None:
    """Four problems a step, in one micro-batch or in several."""
    rows = rows_of(*TEACHERS)
    whole = train(tmp_path / "whole", rows, **weighing)
    split = train(
        tmp_path / "split",
        rows,
        **weighing,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    assert_same(whole, split)


def test_packed_equals_padded(tmp_path: Path) -> None:
    """With the same answer leaves, the layout changes the time a step takes, and nothing else."""
    rows, given = rows_of(*TEACHERS), WEIGHED | {"leaf_budget": 1e6}
    runs = [train(tmp_path / p, rows, **given, layout=p) for p in ("tree", "padded")]
    assert_same(*runs, tolerance=2e-4)


SAVING = WEIGHED | {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
}
_RUN = """
import sys
sys.path[:0] = sys.argv[1].split(":")
import torch
torch.set_num_threads(1)
from pathlib import Path
from helpers.trajectories import TEACHERS, rows_of, train
from test_trajectories import SAVING
resume = sys.argv[3] == "resume"
run = train(Path(sys.argv[2]), rows_of(*TEACHERS), **SAVING, resume_from_checkpoint=resume or None)
torch.save(run[1], sys.argv[4])
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes of `_start`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _start(folder: Path, how: str, out: Path, **env: str) -> subprocess.Popen[bytes]:
    paths = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    command = [sys.executable, "-c", _RUN, paths, str(folder), how, str(out)]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE)


def _end(process: subprocess.Popen[bytes]) -> None:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()[-2000:]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, one_thread: None) -> None:
    """SIGKILL in the middle, a damaged last checkpoint, resume: the same bits at the end."""
    _, whole = train(tmp_path / "whole", rows_of(*TEACHERS), **SAVING)
    killed = tmp_path / "killed"
    process = _start(killed, "fresh", tmp_path / "never.pt")
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-3").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "never.pt").exists()
    last = max(killed.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # a torn file: the one before is taken
    _end(_start(killed, "resume", tmp_path / "resumed.pt"))
    assert torch.equal(whole, torch.load(tmp_path / "resumed.pt"))


def test_native_equals_reference(tmp_path: Path, one_thread: None) -> None:
    """The fused operators and plain torch train the same student."""
    assert backend() == "native"
    _, native = train(tmp_path / "native", rows_of(*TEACHERS), **SAVING)
    out = tmp_path / "reference.pt"
    _end(_start(tmp_path / "reference", "fresh", out, COMPACT_OPS_BACKEND="reference"))
    torch.testing.assert_close(native, torch.load(out), rtol=0, atol=2e-4)


def test_score_log_holds_every_rationale_of_every_step(tmp_path: Path) -> None:
    """The Parquet log: a row a rationale and step, weights that sum to 1 a problem."""
    from compact.trainer.runlog import read_scores

    train(tmp_path, rows_of(*TEACHERS), preset="robust")
    table = read_scores(tmp_path).to_pylist()
    assert len(table) == 2 * 4 * 3
    sums: dict[Any, float] = {}
    for row in table:
        key = (row["step"], row["question_id"])
        sums[key] = sums.get(key, 0.0) + row["weight"]
    assert all(total == pytest.approx(1, abs=1e-5) for total in sums.values())
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "complete" and run["weigher"] == "robust"
