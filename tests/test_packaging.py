"""What a user installs: the wheel holds the libraries, the sdist builds, the import error helps."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _pip(*args: str, cwd: Path) -> None:
    scripts = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "COMPACT_CMAKE_ARGS": "-DCOMPACT_CUDA=OFF",
    }
    command = [sys.executable, "-m", "pip", *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _build_wheel(source: Path, out: Path) -> set[str]:
    _pip("wheel", "--no-build-isolation", "--no-deps", "-w", str(out), str(source), cwd=out)
    (wheel,) = out.glob("*.whl")
    assert "none-any" not in wheel.name
    return set(zipfile.ZipFile(wheel).namelist())


def test_sdist_builds_a_wheel_with_the_libraries(tmp_path: Path) -> None:
    """The sdist is made, unpacked elsewhere, and built there: nothing outside it is needed."""
    sdist = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"]
        + [str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert sdist.returncode == 0, sdist.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "src", filter="data")
    (source,) = (tmp_path / "src").iterdir()
    (tmp_path / "wheel").mkdir()
    names = _build_wheel(source, tmp_path / "wheel")
    assert "compact_ops/libcompact_cpu.so" in names
    assert any(n.startswith("compact/graphs/_graph") and n.endswith(".so") for n in names)
    assert "compact_ops/py.typed" in names
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/")) for n in names)


def test_missing_library_names_path_and_build_command(tmp_path: Path) -> None:
    """A package without its library raises one ImportError; there is no silent fallback."""
    package = tmp_path / "compact_ops"
    package.mkdir()
    for source in (ROOT / "compact_ops").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import compact_ops"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: compact_ops: ")
    assert str(package / "libcompact_cpu.so") in last
    assert "pip install --no-build-isolation ." in last


def test_unknown_backend_is_refused() -> None:
    """COMPACT_OPS_BACKEND takes two words; a third is an error, not a guess."""
    done = subprocess.run(
        [sys.executable, "-c", "import compact_ops"],
        env={**os.environ, "COMPACT_OPS_BACKEND": "fast"},
        capture_output=True,
        text=True,
    )
    assert "must be 'native' or 'reference', got 'fast'" in done.stderr
