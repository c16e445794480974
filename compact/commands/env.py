"""`compact env`: shows versions, machine and operator back end, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import compact_ops

EPILOG = """example:
  compact env
"""
_PACKAGES = (
    "compact-distill",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "rustworkx",
    "numpy",
    "pyarrow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`compact env` takes no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the versions, the machine and the back end of the operators."""
    lines = [(name, _version(name)) for name in _PACKAGES]
    lines += [
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cpus", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"),
        ("cpu capability", torch.backends.cpu.get_cpu_capability()),
        ("operators", compact_ops.about_backend()),
        ("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
