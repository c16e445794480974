"""The CPU kernels as a program without torch: every instruction set, and an emulated Nehalem."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ["tests/native/kernels.cpp"] + [
    f"csrc/kernels/cpu/{name}.cpp"
    for name in ("isa", "linear_token_stats", "pairwise_symmetric_kl")
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program, built without torch: the kernels must not need it."""
    return _build("g++", tmp_path_factory.mktemp("native") / "kernels")


def _build(compiler: str, out: Path) -> Path:
    flags = ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-static"]
    command = [compiler, *flags, "-Icsrc", *SOURCES, "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None,
    reason="no compiler for ARM: apt-get install -y g++-aarch64-linux-gnu qemu-user",
)
def test_kernels_on_another_processor(tmp_path: Path) -> None:
    """Without the instruction sets of x86-64 there is one build, `base`."""
    program = _build("aarch64-linux-gnu-g++", tmp_path / "kernels")
    done = _run(["qemu-aarch64", str(program)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "base"


def _run(command: list[str], capability: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "COMPACT_CPU_CAPABILITY"}
    if capability is not None:
        env["COMPACT_CPU_CAPABILITY"] = capability
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("capability", ["base", "avx2", "avx512"])
def test_kernels_on_each_instruction_set(program: Path, capability: str) -> None:
    """Each build against float64; one that the CPU cannot run raises an error."""
    flags = Path("/proc/cpuinfo").read_text()
    present = capability == "base" or {"avx2": "avx2", "avx512": "avx512bw"}[capability] in flags
    done = _run([str(program)], capability)
    if present:
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines()[0] == capability
    else:
        assert done.returncode != 0 and capability in done.stderr


def test_kernels_on_an_old_cpu(program: Path) -> None:
    """A Nehalem has no AVX: the program picks `base` and runs no instruction that the CPU lacks."""
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if qemu is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "qemu-user"], capture_output=True)
        qemu = shutil.which("qemu-x86_64")
    assert qemu is not None, "qemu-x86_64 is missing: apt-get install -y qemu-user"
    done = _run([qemu, "-cpu", "Nehalem", str(program)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "base"
    refused = _run([qemu, "-cpu", "Nehalem", str(program)], "avx2")
    assert refused.returncode != 0 and "at most base" in refused.stderr


def test_unknown_capability_is_refused(program: Path) -> None:
    """Any other name is an error that lists the three."""
    done = _run([str(program)], "sse9")
    assert done.returncode != 0 and "must be base, avx2 or avx512, got sse9" in done.stderr
