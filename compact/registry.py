"""The registry of all that users may add: metrics, policies, presets, strategies, answer domains.

A module that registers something must be imported before the name is used. Commands import the
modules of `--import MODULE`. The environment variable COMPACT_IMPORT passes the list of modules to
every process that a command starts.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
F = TypeVar("F")

IMPORT_VARIABLE = "COMPACT_IMPORT"
"""Environment variable with the modules to import, separated by commas."""


class Registry(Mapping[str, T], Generic[T]):
    """Named entries of one kind, in order of registration.

    Args:
        kind: what error messages call an entry, such as "metric".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._sources: dict[str, str] = {}

    def add(self, name: str, entry: T, source: object) -> None:
        """Adds `entry` under `name`.

        Args:
            name: the name that users write.
            entry: the object that the name stands for.
            source: the function or class that the entry comes from. The same source may add an
                entry again, as when its module is run again; the new entry replaces the old one.

        Raises:
            ValueError: the name is empty, or another function or class has it.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{self.kind}: name must be text that is not empty, got {name!r}")
        origin = f"{source.__module__}.{getattr(source, '__qualname__', source)}"
        if self._sources.setdefault(name, origin) != origin:
            raise ValueError(f"{self.kind} {name!r} is already taken by {self._sources[name]}")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[F], F]:
        """Returns a decorator that adds a function or class and returns it unchanged."""

        def add(entry: F) -> F:
            self.add(name, entry, entry)  # type: ignore[arg-type]
            return entry

        return add

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Context at whose end all that was added within it is gone, as a test needs it."""
        before = dict(self._entries), dict(self._sources)
        try:
            yield
        finally:
            self._entries, self._sources = before

    def is_built_in(self, name: str) -> bool:
        """Whether an entry comes from this project, and not from a module of the user."""
        return self._sources[name].startswith("compact.")

    def get_or_raise(self, name: str, among: Sequence[str] | None = None) -> T:
        """Returns the entry `name`.

        Args:
            name: the name that the user wrote.
            among: the names that are allowed here; all names if None.

        Raises:
            ValueError: the name is unknown or not allowed; the message lists the allowed names.
        """
        allowed = list(self) if among is None else list(among)
        if name not in allowed:
            raise ValueError(unknown(self.kind, name, allowed))
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def closest(name: str, names: Sequence[str]) -> str | None:
    """Returns the name that a misspelt one was probably meant to be; None if none is close."""
    return next(iter(difflib.get_close_matches(name, names, 1)), None)


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """Returns the message for a name that is not among `names`; it suggests the closest one."""
    near = closest(str(name), names)
    hint = f"; did you mean {near!r}?" if near else ""
    listed = ", ".join(names) or "nothing (none is registered)"
    return f"{kind} must be one of {listed}, got {name!r}{hint}"


def import_modules(names: Sequence[str] = ()) -> None:
    """Imports modules of the user; they may lie in the current folder.

    Args:
        names: modules to import after those of COMPACT_IMPORT. They are added to COMPACT_IMPORT, so
            that the processes which this one starts import them too.

    Raises:
        ImportError: a module cannot be imported; the message names it.
    """
    inherited = [name for name in os.environ.get(IMPORT_VARIABLE, "").split(",") if name]
    wanted = list(dict.fromkeys([*inherited, *names]))
    if not wanted:
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in wanted:
        try:
            importlib.import_module(name)
        except Exception as error:  # the module's code may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ImportError(f"--import {name}: {reason}") from error
    os.environ[IMPORT_VARIABLE] = ",".join(wanted)


def require(package: str, extra: str, why: str) -> None:
    """Checks that an optional package is installed.

    Args:
        package: the package.
        extra: the extra of this project that installs it.
        why: what needs it, as the start of the message.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{why}, which needs the package {package}: pip install {package}, or COMPACT with the "
            f"extra [{extra}]"
        )


def lazy_names(package: str, homes: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package that imports its names when they are first used.

    So a module of the package that needs no torch can be imported without it (PEP 562).

    Args:
        package: the `__name__` of the package.
        homes: public name -> (module, its name there).
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        value = getattr(importlib.import_module(module), attribute)
        setattr(sys.modules[package], name, value)
        return value

    return get
