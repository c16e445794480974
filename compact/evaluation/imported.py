"""Tells which code of the user results depend on, so that they are not kept when it changes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from compact.answers.base import DOMAINS
from compact.files import content_of
from compact.registry import IMPORT_VARIABLE, Registry


def imports_of(
    names: Collection[str] = (), among: Collection[Registry[Any]] = ()
) -> dict[str, Any]:
    """Returns {"imports": module of --import -> SHA-256 of its files}, for the settings of rows.

    It is empty if nothing that is used comes from outside this project. Answer domains are always
    used. Modules that a module imports, other than its own parts, are not looked at.

    Args:
        names: what the results are made with.
        among: the registries that may hold these names.
    """
    used = [(DOMAINS, name) for name in DOMAINS]
    used += [(registry, name) for registry in among for name in names if name in registry]
    if all(registry.is_built_in(name) for registry, name in used):
        return {}
    modules = [name for name in os.environ.get(IMPORT_VARIABLE, "").split(",") if name]
    return {"imports": {name: _content_of_module(name) for name in modules}} if modules else {}


def _content_of_module(name: str) -> str:
    """Returns a SHA-256, in hexadecimal, of the files of a module and of the parts of a package."""
    found = hashlib.sha256()
    for part, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if (part == name or part.startswith(f"{name}.")) and file and Path(file).is_file():
            found.update(f"{part} {content_of(file)} ".encode())
    return found.hexdigest()
