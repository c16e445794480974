"""`compact train --num_processes 2` starts accelerate and reports errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from compact.commands.cli import main
from compact.commands.train import _accelerate_config, _cause
from compact.lab import zoo
from helpers.toy import save_student

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a tiny student: two steps of four problems, every weight trained."""
    root = tmp_path_factory.mktemp("ranks")
    save_student(root / "student")
    rows = zoo.make_rows(("good", "verbose"), 8, seed=1)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(root / "student"),
        "data": str(root / "data.jsonl"),
        "preset": "paper",
        "use_peft": False,
        "num_train_epochs": 1,
        "max_length": 400,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,
        "use_cpu": True,
        "report_to": "none",
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs a `compact` command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "compact", *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(run: Path) -> list[float]:
    state = json.loads((run / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("kind", ["fsdp2", "deepspeed-zero3"])
def test_sharded_by_name_trains_the_same_student(kind: str, recipe: Path, tmp_path: Path) -> None:
    """Two sharded ranks of two micro-batches, and one process of four: the same saved student."""
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="`make deepspeed` runs this")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", "--config", str(recipe), "--output_dir", str(one)]) == 0
    argv = ["train", "--config", str(recipe), "--output_dir", str(two), "--num_processes", "2"]
    argv += ["--accelerate_config", kind, "--gradient_accumulation_steps", "2"]
    done = start(*argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"student, log and scores: {two}" in done.stdout
    file = {"fsdp2": "pytorch_model_fsdp.bin"}.get(kind, "zero_to_fp32.py")
    assert (two / "checkpoint-2" / file).exists()  # it was this that ran
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    expected, found = (load_file(run / "model.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)


def test_a_rank_ends_after_the_libraries_and_before_python() -> None:
    """What libraries registered for the end runs; Python is not taken apart (gloo would abort)."""
    code = """
import atexit, runpy, sys
class Last:
    def __del__(self): print("Python was taken apart", flush=True)
sys.modules["last"] = Last()
def main(argv=None):
    atexit.register(print, "a library ended")
    print("work done", end=" ")
    return 3
import compact.commands.cli
compact.commands.cli.main = main
runpy.run_module("compact", run_name="__main__")
"""
    for launched, expected in (
        ({"COMPACT_REPORT_TO_LAUNCHER": "1"}, "work done a library ended\n"),
        ({}, "work done a library ended\nPython was taken apart\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | launched, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (3, expected), done.stderr


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [("SystemExit(2)", 2, ""), ("SystemExit()", 0, ""), ("SystemExit('no')", 1, "no\n")],
)
def test_a_rank_ends_with_the_status_of_what_ended_it(raised: str, status: int, told: str) -> None:
    """A wrong option ends `main` with SystemExit(2)."""
    code = f"""
import runpy
def main(argv=None):
    raise {raised}
import compact.commands.cli
compact.commands.cli.main = main
runpy.run_module("compact", run_name="__main__")
"""
    launched = os.environ | {"COMPACT_REPORT_TO_LAUNCHER": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=launched, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, told)


def test_error_of_a_rank_is_one_line(recipe: Path, tmp_path: Path) -> None:
    """Input that ranks cannot read is reported once, without the launcher's own report."""
    (tmp_path / "empty").mkdir()
    argv = ["train", "--config", str(recipe), "--num_processes", "2"]
    done = start(*argv, "--model", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("compact: error: ") and done.stderr.count("\n") == 1, done.stderr


def test_the_first_cause_is_told_and_not_who_was_ended_for_it() -> None:
    """Process 1 reports an error or is killed; process 0 only gets the launcher's SIGTERM."""
    ended, killed, told = (
        ProcessFailure(0, 10, status, "") for status in (-signal.SIGTERM, -signal.SIGKILL, 1)
    )
    ended.timestamp, killed.timestamp, told.timestamp = 100, 100, 101
    told.message = {"message": "data.jsonl:3: no"}
    assert _cause(ChildFailedError("train", {0: ended, 1: killed})) == "process 1 failed (SIGKILL)"
    assert _cause(ChildFailedError("train", {0: ended, 1: told})) == "data.jsonl:3: no"


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_configurations(name: str) -> None:
    """Each is found by its name and read by accelerate."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert _accelerate_config(name).read_text() == (RECIPES / f"{name}.yaml").read_text()
    config: Any = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.num_processes == 2
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type.value == kind
