"""Builds the native libraries with CMake and ninja and installs them into the packages.

Environment variables:
    COMPACT_NATIVE: ON or OFF, whether to compile; by default where there is a C++ compiler. Without
        compiled libraries the package runs on plain torch, and says so.
    COMPACT_CUDA: ON, OFF or AUTO (the default), see CMakeLists.txt.
    COMPACT_CMAKE_ARGS: more arguments of CMake.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import copyfile, copytree, which

import setuptools
from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# compact_ops/_library.py reads this file: why the libraries were left out of this installation.
NOTE = "compact_ops/no_native.txt"
LEAST_SETUPTOOLS = 77  # the first that reads the licence of pyproject.toml


def why_not_native() -> str | None:
    """Returns why nothing is compiled; None where the libraries are.

    Raises:
        SystemExit: they were asked for, but cannot be built here.
    """
    asked = os.environ.get("COMPACT_NATIVE", "AUTO").upper()
    if asked not in ("AUTO", "ON", "OFF"):
        sys.exit(f"COMPACT_NATIVE must be AUTO, ON or OFF, got {asked!r}")
    if asked == "OFF":
        return "it was installed with COMPACT_NATIVE=OFF"
    named = os.environ.get("CXX", "").split()
    why = None
    if sys.platform != "linux":
        why = "the libraries are built on Linux only"
    elif not any(which(name) for name in (named[:1] or ["c++", "g++", "clang++"])):
        compilers = named[0] if named else "c++, g++ or clang++"
        why = f"no C++ compiler was found ({compilers}) when installing"
    if why is not None and asked == "ON":
        sys.exit(f"COMPACT_NATIVE=ON, but {why}")
    return why


def check_build_tools() -> None:
    """Raises SystemExit with one line that names what compiling needs and is missing."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    needs = {
        "cmake": (which("cmake"), "pip install cmake"),
        "ninja": (which("ninja"), "pip install ninja"),
        f"{header}": (header.exists(), "apt install python3-dev, or dnf install python3-devel"),
    }
    for name, (found, install) in needs.items():
        if not found:
            sys.exit(
                f"{name} is missing: {install}; COMPACT_NATIVE=OFF installs without compiled "
                "libraries"
            )


def cmake(*arguments: str) -> None:
    """Runs cmake; raises SystemExit if it fails, and it has said why."""
    if subprocess.run(["cmake", *arguments]).returncode:
        sys.exit(
            "compact: the native libraries could not be built, see above; COMPACT_CUDA=OFF leaves "
            "the CUDA kernels out, COMPACT_NATIVE=OFF all of them"
        )


class Packages(build_py):
    """Copies the packages, and notes in them why they come without compiled libraries."""

    def run(self) -> None:
        """Runs the step; an editable installation keeps its files where they are."""
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        note = root / NOTE
        note.unlink(missing_ok=True)
        if WHY_NOT_NATIVE is not None:
            print(f"compact: builds no native libraries: {WHY_NOT_NATIVE}", flush=True)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(WHY_NOT_NATIVE + "\n")
        if not self.editable_mode:  # for `compact train --accelerate_config fsdp2`
            copytree(ROOT / "recipes", root / "compact/recipes", dirs_exist_ok=True)
            for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")):
                target = root / "compact" / page.relative_to(ROOT)  # for `compact docs`
                target.parent.mkdir(parents=True, exist_ok=True)
                copyfile(page, target)


class CMakeBuild(build_ext):
    """Builds the targets of CMakeLists.txt, which holds the only list of sources."""

    def run(self) -> None:
        """Configures, builds and installs into the package folders (in place when editable)."""
        if WHY_NOT_NATIVE is not None:
            return
        check_build_tools()
        # An editable install builds where `make native` rebuilds.
        build_dir = ROOT / "build/native" if self.inplace else Path(self.build_temp).resolve()
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = ["-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        # Named every time: CMake remembers the ninja of an earlier environment, which pip removed.
        configure += [f"-DCMAKE_MAKE_PROGRAM={which('ninja')}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
        configure += [f"-DCOMPACT_CUDA={os.environ.get('COMPACT_CUDA', 'AUTO')}"]
        configure += os.environ.get("COMPACT_CMAKE_ARGS", "").split()
        cmake(*configure)
        cmake("--build", str(build_dir))
        for old in prefix.glob("compact_ops/libcompact_*.so"):  # of a build with other settings
            old.unlink()
        cmake("--install", str(build_dir))


class NativeDistribution(Distribution):
    """Marks a wheel with libraries as platform-specific, as setuptools itself compiles nothing."""

    def has_ext_modules(self) -> bool:
        """Returns whether there are libraries, which decides on the tag of the wheel."""
        return WHY_NOT_NATIVE is None


if int(setuptools.__version__.split(".")[0]) < LEAST_SETUPTOOLS:
    sys.exit(
        f"setuptools must be at least {LEAST_SETUPTOOLS}, got {setuptools.__version__}: "
        "pip install -U setuptools"
    )
WHY_NOT_NATIVE = why_not_native()
setup(cmdclass={"build_py": Packages, "build_ext": CMakeBuild}, distclass=NativeDistribution)
