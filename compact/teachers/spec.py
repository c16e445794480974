"""Reads teachers.yaml: who is asked, where, how, and at what price.

A key of an endpoint is named by its environment variable. Its value is read when the teacher is
asked, and stands in no file, no log and no error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from compact.fields import compose, converted, field_types, mapping
from compact.files import content_of_student
from compact.teachers.prompts import find_template

SHORTEST_KEY = 8
"""Fewest characters of a key that is looked for in texts; a local server may ask for any word."""
_NAME = re.compile(r"[^\s#=,:/\\]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_FIELDS = ("model", "messages", "stream", "n", "temperature", "top_p", "max_tokens")


@dataclass(frozen=True)
class Teacher:
    """One entry of teachers.yaml. The fields are its keys.

    Attributes:
        name: how its rationales are called in the data.
        model: the name that the endpoint knows.
        base_url: the endpoint, such as http://localhost:8000/v1.
        api_key_env: environment variable that holds the key. None: the endpoint needs none.
        local: folder, hub name or .gguf file of a model to run in this process, in place of
            `model` and `base_url`.
        n: samples of each question.
        temperature, top_p: how samples are drawn. None: the endpoint's default.
        max_tokens: most tokens that the teacher writes. None: no limit is sent; a local model
            writes at most 1024.
        system: the system message.
        template: a name of `prompts.TEMPLATES`, or a text with {question}.
        extra_body: further fields of the request, such as {seed: 1}.
        price: `in` and `out`, for a million tokens, in any one currency.
        concurrency: most requests at the same time.
        requests_per_minute: most requests started in a minute.
        timeout: seconds after which a request has failed.
        reasoning: what the export does with the separate reasoning of a reasoning model: `apart` (a
            field of its own), `completion` (before the answer, in <think> tags) or `drop`.
        keep_cut: whether the export keeps answers that were cut at `max_tokens`.
    """

    name: str
    model: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    local: str | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = 1024
    system: str | None = None
    template: str = "step-by-step"
    extra_body: dict[str, Any] = field(default_factory=dict)
    price: dict[str, float] = field(default_factory=dict)
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout: float = 300.0
    reasoning: Literal["apart", "completion", "drop"] = "apart"
    keep_cut: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError, which starts with the name of the field, for a value out of range."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must have no space and none of # = , : / \\, got {self.name!r}")
        if (self.local is None) == (self.base_url is None):
            both = "both" if self.local else "neither"
            raise ValueError(f"base_url or local must be given, got {both}")
        if self.base_url is not None:
            _check_url(self.base_url)
            if not self.model:
                raise ValueError("model must be given with base_url, got none")
        if self.local is not None and (self.model or self.api_key_env or self.extra_body):
            raise ValueError("local must stand without model, api_key_env and extra_body")
        for name in ("n", "concurrency", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("requests_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 with temperature 0 (all samples agree), got {self.n}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        find_template(self.template)
        for name in self.extra_body:
            if name in _OWN_FIELDS:
                raise ValueError(f"extra_body must not hold {name!r}, which is a key of its own")
        if not set(self.price) <= {"in", "out"}:
            raise ValueError(f"price must hold in and out, got {', '.join(map(str, self.price))}")
        for name, value in self.price.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"price: {name} must be a number of at least 0, got {value!r}")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Returns the price of so many tokens."""
        price = self.price
        return (price.get("in", 0) * prompt_tokens + price.get("out", 0) * completion_tokens) / 1e6

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that an answer can have, None if nothing limits them."""
        found = self.extra_body.get("max_completion_tokens", self.max_tokens)
        return None if found is None else int(found)

    def parameters(self) -> dict[str, Any]:
        """Returns what a request holds beside its messages, without the fields that are not sent.

        A local model is named with a hash of its weights, so that a trained one is asked anew.
        """
        local = self.local
        model = self.model if local is None else f"{local}@{content_of_student(local)[:12]}"
        found = {
            "model": model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "extra_body": self.extra_body or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def key(self) -> str | None:
        """Returns the value of the key's variable, None if the endpoint needs none.

        Raises:
            ValueError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        found = os.environ.get(self.api_key_env, "").strip()
        if not found:
            raise ValueError(
                f"teacher {self.name!r}: api_key_env must name an environment variable that is set"
            )
        return found


def read_teachers(path: str | Path) -> list[Teacher]:
    """Reads teachers.yaml: a list of teachers, or a mapping with the list under `teachers`.

    Raises:
        ValueError: `file:line: key ...` for a key that is unknown, missing or has a wrong value, a
            name that occurs twice, two teachers with the same requests, or a key of an endpoint
            that stands in the file.
        OSError: the file cannot be read.
    """
    path = Path(path)
    root, values = compose(path)
    if isinstance(root, yaml.MappingNode) and set(values) == {"teachers"}:
        root, values = root.value[0][1], values["teachers"]
    if not isinstance(root, yaml.SequenceNode) or not values:
        found = "nothing" if not values else type(values).__name__
        raise ValueError(f"{path}: expected a list of teachers (- name: ...), got {found}")
    teachers: list[Teacher] = []
    lines: dict[str, str] = {}
    for node, entry in zip(root.value, values, strict=True):
        where = f"{path}:{node.start_mark.line + 1}"
        if not isinstance(node, yaml.MappingNode) or not isinstance(entry, dict):
            raise ValueError(f"{where}: expected `key: value` lines, got {type(entry).__name__}")
        teacher = _teacher(mapping(node, entry, path), where)
        if teacher.name in lines:
            first = lines[teacher.name]
            raise ValueError(
                f"{where}: name {teacher.name!r} is also that of the teacher at {first}"
            )
        for other in teachers:
            if _asks(teacher) == _asks(other):
                raise ValueError(
                    f"{where}: teacher {teacher.name!r} sends the same requests as {other.name!r}; "
                    "give it another model, template or temperature, or raise n of the first"
                )
        teachers.append(teacher)
        lines[teacher.name] = where
    _check_no_key(path, teachers)
    return teachers


def _teacher(given: Mapping[str, tuple[Any, str]], where: str) -> Teacher:
    """Returns the teacher of one entry; errors name the line of the key."""
    types = field_types(Teacher)
    values = {}
    for key, (value, line) in given.items():
        if key in ("api_key", "key", "token"):  # never with its value
            raise ValueError(
                f"{line}: {key} must not stand in a file; set an environment variable and give its "
                "name as api_key_env"
            )
        if key not in types:
            raise ValueError(f"{line}: unknown key {key!r}; the keys are {', '.join(types)}")
        if key == "api_key_env" and not (isinstance(value, str) and _VARIABLE.fullmatch(value)):
            # The value is not shown: it may be the key itself.
            raise ValueError(f"{line}: api_key_env must be the name of an environment variable")
        values[key] = converted(value, types[key], f"{line}: {key}")
    if "name" not in values:
        raise ValueError(f"{where}: key 'name' is missing")
    try:
        return Teacher(**values)
    except ValueError as error:
        key = str(error).split()[0].rstrip(":")
        raise ValueError(f"{given.get(key, (None, where))[1]}: {error}") from None


def _asks(teacher: Teacher) -> tuple[Any, ...]:
    """Returns what a request of a teacher depends on, apart from the question."""
    place = teacher.local or teacher.model
    return (
        *(place, teacher.temperature, teacher.top_p, teacher.max_tokens, teacher.system),
        *(repr(teacher.extra_body), find_template(teacher.template)),
    )


def _check_url(url: str) -> None:
    """Raises ValueError unless an address is HTTP and holds no password. It is not shown."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        raise ValueError("base_url must be an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url must hold neither user, password nor query; use api_key_env")


def _check_no_key(path: Path, teachers: Sequence[Teacher]) -> None:
    """Raises ValueError if the file holds the value of one of its variables."""
    text = path.read_text(encoding="utf-8")
    for teacher in teachers:
        key = os.environ.get(teacher.api_key_env or "", "").strip()
        if len(key) >= SHORTEST_KEY and key in text:
            raise ValueError(f"{path}: holds the key of teacher {teacher.name!r}; remove it")
