"""Builds the native libraries with CMake and ninja and installs them into the packages."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copyfile, copytree

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds the targets of CMakeLists.txt, which holds the only list of sources."""

    def run(self) -> None:
        """Configures, builds and installs into the package folders (in place when editable)."""
        # An editable install builds where `make native` rebuilds.
        build_dir = ROOT / "build/native" if self.inplace else Path(self.build_temp).resolve()
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        cmake = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        cmake += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
        cmake += os.environ.get("COMPACT_CMAKE_ARGS", "").split()
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(["cmake", "--install", str(build_dir)], check=True)
        if not self.inplace:  # for `compact train --accelerate_config fsdp2`
            copytree(ROOT / "recipes", prefix / "compact/recipes", dirs_exist_ok=True)
            for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")):
                target = prefix / "compact" / page.relative_to(ROOT)  # for `compact docs`
                target.parent.mkdir(parents=True, exist_ok=True)
                copyfile(page, target)


class NativeDistribution(Distribution):
    """Marks the wheel as platform-specific, although setuptools itself compiles nothing."""

    def has_ext_modules(self) -> bool:
        """Returns True, so that the wheel is tagged for this platform."""
        return True


setup(cmdclass={"build_ext": CMakeBuild}, distclass=NativeDistribution)
