"""What a user installs: the wheel works in a fresh environment, with and without libraries."""

import os
import re
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
    wheel, said = _wheel(source, tmp_path, COMPACT_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug")  # quicker
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


def _setup(source: Path, tools: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with the programs of a folder before all others."""
    path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=source,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


def _stand_in(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_rebuild_that_fails_leaves_the_old_libraries(source: Path, tmp_path: Path) -> None:
    old = source / "compact_ops/libcompact_cpu.so"
    old.touch()
    _stand_in(tmp_path / "bin/cmake", 'case $1 in --build) exit 1;; esac; echo "cmake $*"')
    done = _setup(source, tmp_path / "bin", "build_ext", "--inplace")
    assert done.returncode != 0 and old.exists()
    assert "COMPACT_CUDA=OFF leaves the CUDA kernels out" in done.stderr.splitlines()[-1]
    _stand_in(tmp_path / "bin/cmake", 'echo "cmake $*"')
    assert _setup(source, tmp_path / "bin", "build_ext", "--inplace").returncode == 0
    assert not old.exists()  # one of other settings is not left behind


def test_a_second_build_has_a_ninja_of_its_own(source: Path, tmp_path: Path) -> None:
    """pip removes the environment of the first, and CMake would remember the path."""
    for name in ("one", "two"):
        _stand_in(tmp_path / name / "cmake", 'echo "cmake $*"')
        ninja = _stand_in(tmp_path / name / "ninja", "exit 0")
        done = _setup(source, tmp_path / name, "build_ext")
        assert f" -DCMAKE_MAKE_PROGRAM={ninja} " in done.stdout, done.stderr


def test_elsewhere_than_on_linux_nothing_is_built(source: Path) -> None:
    code = "import runpy, sys, setuptools.command.build_ext; setuptools.setup = lambda **_: None; "
    code += "sys.platform = 'darwin'; print(runpy.run_path('setup.py')['WHY_NOT_NATIVE'])"
    done = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=source,
            env={**os.environ, "COMPACT_NATIVE": asked},
            capture_output=True,
            text=True,
        )
        for asked in ("AUTO", "ON")
    ]
    assert done[0].stdout == "the libraries are built on Linux only\n", done[0].stderr
    assert done[1].stderr == "COMPACT_NATIVE=ON, but the libraries are built on Linux only\n"


def test_make_wants_a_compiler(tmp_path: Path) -> None:
    """Without one it stops; a set-up without libraries would be kept after g++ is there."""
    command = ["make", "-n", f"VENV={tmp_path}", f"{tmp_path}/.ready"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (line,) = [x for x in done.stdout.replace("\\\n", "").splitlines() if "--no-deps -e ." in x]
    assert " COMPACT_NATIVE=ON " in line


def test_an_nvcc_that_is_too_old(tmp_path: Path) -> None:
    """AUTO leaves the CUDA kernels out and says why, ON fails, and no answer is kept."""
    (tmp_path / "torch/lib").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    nvcc, calls = tmp_path / "bin/nvcc", tmp_path / "calls"

    def configure(cuda: str, release: str | None) -> str:
        says = f"echo 'Cuda compilation tools, release {release}, V'" if release else "exit 1"
        _stand_in(nvcc, f'[ "$1" = --version ] || {{ echo >> {calls}; exit 1; }}; {says}')
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCOMPACT_CUDA={cuda}"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(tmp_path), "CUDACXX": str(nvcc)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode == 0) == (cuda == "AUTO")
        said = " ".join((done.stdout + done.stderr).split())
        return said[said.index("CUDA kernels OFF" if cuda == "AUTO" else "COMPACT_CUDA=ON") :]

    assert "OFF (no nvcc was found; set CUDACXX" in configure("AUTO", None)
    assert "OFF (nvcc must be 12.0 or later, got 11.5;" in configure("AUTO", "11.5")
    assert "ON, but nvcc must be 12.0 or later, got 11.5;" in configure("ON", "11.5")
    assert not calls.exists()
    for _ in range(2):  # it is tried again
        assert "OFF (nvcc 12.9 compiles nothing here" in configure("AUTO", "12.9")
        calls.unlink()


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


def test_on_a_gpu_without_the_cuda_library(tmp_path: Path) -> None:
    """Every operator names the ways out; its CUDA kernel is called here with tensors of the CPU."""
    env = _copied_operators(tmp_path) | {"COMPACT_OPS_BACKEND": "native"}
    library = "compact_ops/libcompact_cpu.so"
    shutil.copyfile(ROOT / library, tmp_path / library)
    command = [sys.executable, "-c", _ON_CUDA]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *called, error = done.stdout.splitlines()
    schemas = (ROOT / "csrc/library.cpp").read_text()
    assert sorted(called) == sorted(re.findall(r'm\.def\(\s*"(\w+)\(', schemas))
    assert f"{tmp_path}/compact_ops/libcompact_cuda.so is missing" in error
    for way in ("COMPACT_CUDA=ON pip install", "COMPACT_OPS_BACKEND=reference", "use_cpu: true"):
        assert way in error


_ON_CUDA = """
import torch
import compact_ops
for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
    if name.startswith("compact::"):
        print(name.removeprefix("compact::"))
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
one = torch.ones(1)
try:
    torch.ops.compact.problem_weights.default.redispatch(
        keys, torch.ones(1, 2), torch.tensor([0, 2]), one, one, 1.0, 0, 0.0, 0.0
    )
except ImportError as error:
    print(error)
"""


def _import(cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import compact_ops; print(compact_ops.about_backend())"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_unknown_backend_is_refused(tmp_path: Path) -> None:
    """COMPACT_OPS_BACKEND takes two words; a third is an error, not a guess."""
    done = _import(ROOT, {**os.environ, "COMPACT_OPS_BACKEND": "fast"})
    assert "must be 'native' or 'reference', got 'fast'" in done.stderr
