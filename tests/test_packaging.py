"""What a user installs: the wheel works in a fresh environment, with and without libraries."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as b, sys; b.{}(sys.argv[1])"


def _call(hook: str, out: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Calls a build hook of setuptools as pip does, in this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COMPACT_CUDA": "OFF", **variables}
    command = [sys.executable, "-c", BUILD.format(hook), str(out)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist: nothing outside it is needed."""
    folder = tmp_path_factory.mktemp("sdist")
    done = _call("build_sdist", folder, ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "src", filter="data")
    (unpacked,) = (folder / "src").iterdir()
    return unpacked


def _smoke(wheel: Path, backend: str, *options: str) -> None:
    command = [sys.executable, ROOT / "tools/smoke_wheel.py", wheel, "--backend", backend, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed" in done.stdout


def _wheel(source: Path, out: Path, **variables: str) -> tuple[Path, str]:
    done = _call("build_wheel", out, source, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout


def test_a_wheel_with_the_libraries(source: Path, tmp_path: Path) -> None:
    wheel, said = _wheel(source, tmp_path)
    assert said.count("compact: builds the CPU operators and the graphs; CUDA kernels OFF") == 1
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "compact_ops/libcompact_cpu.so" in names
    assert "compact_ops/no_native.txt" not in names
    assert any(n.startswith("compact/graphs/_graph") and n.endswith(".so") for n in names)
    assert "compact_ops/py.typed" in names
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/")) for n in names)


def test_a_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """It has no library, installs anywhere, says so once, and trains."""
    wheel, said = _wheel(source, tmp_path, CXX="/nowhere/g++")
    assert said.count("compact: builds no native libraries: no C++ compiler was found") == 1
    assert wheel.name.endswith("py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    _smoke(wheel, "reference", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_every_command_runs_in_a_fresh_environment(
    source: Path, tmp_path: Path, backend: str
) -> None:
    variables = {"CXX": "/nowhere/g++"} if backend == "reference" else {}
    _smoke(_wheel(source, tmp_path, **variables)[0], backend)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"COMPACT_NATIVE": "ON", "CXX": "/nowhere/g++"}, "COMPACT_NATIVE=ON, but no C++ compiler"),
        ({"COMPACT_NATIVE": "maybe"}, "COMPACT_NATIVE must be AUTO, ON or OFF, got 'MAYBE'"),
        ({"COMPACT_CUDA": "maybe"}, "COMPACT_CUDA must be AUTO, ON or OFF, got maybe"),
    ],
)
def test_a_build_that_cannot_be(
    source: Path, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    done = _call("build_wheel", tmp_path, source, **variables)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("import setuptools; setuptools.__version__ = '65.5.0'", "setuptools must be at least 77"),
        ("import sysconfig; sysconfig.get_path = lambda *_: '/no'", "/no/Python.h is missing: apt"),
        ("import os; os.environ['PATH'] = os.path.dirname('{cxx}')", "is missing: pip install"),
    ],
)
def test_a_missing_tool_is_one_line(source: Path, change: str, words: str) -> None:
    """The last line says what to install."""
    run = "import runpy, sys; sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    change = change.format(cxx=_lone_compiler(source))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", f"{change}; {run}"],
        cwd=source,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert words in done.stderr.strip().splitlines()[-1]


def _lone_compiler(source: Path) -> Path:
    """A folder with a C++ compiler and nothing else."""
    compiler = source.parent / "bin/c++"
    compiler.parent.mkdir(exist_ok=True)
    if not compiler.exists():
        compiler.symlink_to(str(shutil.which("c++")))
    return compiler


def _copied_operators(folder: Path) -> dict[str, str]:
    """Copies compact_ops without its libraries; returns the environment that imports the copy."""
    package = folder / "compact_ops"
    package.mkdir()
    for file in (ROOT / "compact_ops").glob("*.py"):
        (package / file.name).write_text(file.read_text())
    env = {k: v for k, v in os.environ.items() if k != "COMPACT_OPS_BACKEND"}
    return env | {"PYTHONPATH": str(folder)}


def test_missing_library_names_path_and_build_command(tmp_path: Path) -> None:
    """A package that lost its library raises one ImportError; there is no silent fallback."""
    env = _copied_operators(tmp_path)
    done = _import(tmp_path, env)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: compact_ops: ")
    assert str(tmp_path / "compact_ops/libcompact_cpu.so") in last
    assert "pip install --no-build-isolation ." in last


def test_without_libraries_the_import_says_so(tmp_path: Path) -> None:
    """Unless the native backend is asked for, which is refused."""
    env = _copied_operators(tmp_path)
    (tmp_path / "compact_ops/no_native.txt").write_text("no C++ compiler was found\n")
    done = _import(tmp_path, env)
    assert done.returncode == 0
    assert done.stdout == (
        "reference (plain torch, slow and hungry for memory: no C++ compiler was found)\n"
    )
    assert done.stderr.count("RuntimeWarning: compact_ops: plain torch, slow and hungry") == 1
    asked = _import(tmp_path, env | {"COMPACT_OPS_BACKEND": "reference"})
    assert asked.returncode == 0 and asked.stderr == ""
    refused = _import(tmp_path, env | {"COMPACT_OPS_BACKEND": "native"})
    assert "libcompact_cpu.so is missing" in refused.stderr


def _import(cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import compact_ops; print(compact_ops.about_backend())"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_unknown_backend_is_refused(tmp_path: Path) -> None:
    """COMPACT_OPS_BACKEND takes two words; a third is an error, not a guess."""
    done = _import(ROOT, {**os.environ, "COMPACT_OPS_BACKEND": "fast"})
    assert "must be 'native' or 'reference', got 'fast'" in done.stderr
