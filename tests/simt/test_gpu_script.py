"""`make gpu` without a GPU: it stops with one line; with fake tools it runs to the end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ["device", "torch", "build", "pytest", "memcheck", "racecheck", "synccheck"]
STEPS += ["bounds", "head", "ops", "kl", "attention"]


def stand_in(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts only, so that no run writes into this checkout."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "bin").mkdir()
    return tmp_path


def run(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{checkout}/bin:/usr/bin:/bin", "PY": f"{checkout}/bin/python"} | env
    return subprocess.run(
        ["bash", str(checkout / "tools/gpu.sh")], capture_output=True, text=True, env=env
    )


def test_without_a_gpu_it_says_so_in_one_line(checkout):
    no_python = run(checkout)
    stand_in(checkout / "bin/python", f'exec {sys.executable} "$@"')
    stand_in(checkout / "bin/nvidia-smi", "echo 'No devices were found'; exit 6")
    no_device = run(checkout)
    stand_in(checkout / "bin/nvidia-smi", "echo 'GPU 0: stand-in'")
    no_wheel = run(checkout, WHEEL="missing.whl")
    blind_torch = run(checkout, CUDA_VISIBLE_DEVICES="")
    for done, words in (
        (no_python, "no Python at"),
        (no_device, "no GPU"),
        (no_wheel, "no such file"),
        (blind_torch, "sees no GPU"),
    ):
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and words in done.stderr
    assert not (checkout / "gpu-results").exists()


@pytest.mark.parametrize("failing", [None, "racecheck", "bounds"])
def test_every_step_runs_and_a_failure_is_not_lost(checkout, failing):
    stand_in(checkout / "bin/nvidia-smi", "echo 'GPU 0: stand-in'")
    stand_in(checkout / "bin/nvcc", "echo 'release 13.0'")
    # Stops where its tool is the failing one; else runs the command after its own options.
    stand_in(
        checkout / "bin/compute-sanitizer",
        f'[ "$2" != "{failing}" ] || exit 1\nwhile [[ $1 == --* ]]; do shift 2; done\nexec "$@"',
    )
    stand_in(checkout / "bin/python", f'case "$*" in *{failing}*) exit 3;; esac\necho "ran $*"')
    done = run(checkout)
    summary = (checkout / "gpu-results/summary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in summary] == STEPS
    bad = [line for line in summary if not line.endswith("exit 0")]
    assert len(bad) == (failing is not None) and done.returncode == len(bad), done.stdout
    log = (checkout / "gpu-results/memcheck.txt").read_text()
    assert "pytest -x -m cuda" in log
    assert "--device cuda" in (checkout / "gpu-results/head.txt").read_text()
    assert os.access(checkout / "tools/gpu.sh", os.X_OK)
