"""Opens, reads and checks files; writes outputs whole, and never over a file of somebody else.

Reading: `read_text`, `read_json`, `parse_yaml` and `json_lines` turn every way in which a file can
be bad (missing, a folder, not UTF-8, cut, nested too deeply, of another shape) into one line that
names the file and the place.

Writing: an output is written beside its target, synced to disk, and renamed. It replaces only a
file that this tool made. To recognise one, `write_whole` notes the kind and the SHA-256 of each
output in a hidden folder beside it: FOLDER/.compact/NAME. A file that has no note, or another kind
or content than its note says, is somebody else's, and is kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

RECORDS = ".compact"
"""The folder beside an output that holds the note about it."""
MAX_FILE = 256 << 20
"""Most bytes of a file that is read in one piece."""
MAX_LINE = 64 << 20
"""Most bytes of a line of JSON lines."""
MAX_YAML = 256 << 10
"""Most bytes of a YAML file."""
MAX_DEPTH = 64
"""Most levels of nesting in JSON and YAML."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")
# Files that loaders of models and of runs read by name; no output of a command has such a name.
_READ_BY_NAME = re.compile(
    r"(?:adapter_|generation_|tokenizer_|preprocessor_)?config\.json|tokenizer\.(?:json|model)"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt"
    r"|chat_template\.jinja|run\.json|(?:trainer|compact)_state\.json|manifest\.json"
    r"|.*\.(?:safetensors|bin|gguf|pt|pth|py)|.*\.index\.json"
)
_UNFINISHED = ".writing"
_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_BLOCK = 1 << 16  # bytes


# Reading


def shipped(folder: str) -> Path:
    """Returns a folder that is installed in the package, or stands beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(f for f in (package / folder, package.parent / folder) if f.is_dir())


def check_input(path: str | Path) -> None:
    """Raises OSError unless `path` is a plain file; a pipe would hang, or end after one reading."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise OSError(f"{path}: expected a file, got a device or a pipe")


def read_bytes(path: str | Path, limit: int = MAX_FILE) -> bytes:
    """Reads a file of at most `limit` bytes.

    Raises:
        OSError: there is no such file, it is a folder or no plain file, or it cannot be read.
        ValueError: it is larger.
    """
    check_input(path)
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: expected at most {limit >> 10} KiB, got more")
    return content


def decoded(raw: bytes, where: str) -> str:
    """Returns UTF-8 bytes as text; `where` names them in the ValueError about other bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        where = f"{where}:{line + 1}" if line else where
        raise ValueError(f"{where}: expected UTF-8 text, got {error.reason}") from None


def read_text(path: str | Path, limit: int = MAX_FILE) -> str:
    """Reads a UTF-8 file; a byte-order mark at its start is dropped.

    Raises:
        OSError, ValueError: as in `read_bytes`, or the file is not UTF-8.
    """
    return decoded(read_bytes(path, limit), str(path)).removeprefix("\ufeff")


def parse_json(text: str, where: str) -> Any:
    """Reads a JSON value.

    Args:
        text: the JSON text.
        where: how an error names it, `file` or `file:line`.

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, a key given twice in an object, half
            of a surrogate pair, or a number with thousands of digits.
    """
    try:
        value = json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text else where
        raise ValueError(
            f"{place}: expected JSON, got {error.msg} at column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: {_TOO_DEEP}") from None
    except ValueError as error:  # a key given twice, or an integer that is too long
        raise ValueError(f"{where}: expected JSON, got {str(error).split(';')[0]}") from None
    check_depth(value, text, where)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{where}: expected text, got half of a surrogate pair") from None
    return value


def check_depth(value: Any, text: str, where: str) -> None:
    """Raises ValueError if a value, read from a JSON text, is nested deeper than `MAX_DEPTH`."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where}: {_TOO_DEEP}")


_TOO_DEEP = f"expected at most {MAX_DEPTH} levels of nesting, got more"


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of JSON pairs; raises ValueError if a key is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:40]!r} twice in one object")
    return found


def _depth(value: Any) -> int:
    """Returns the levels of nesting, at most `MAX_DEPTH` + 1."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth


def read_json(path: str | Path, shape: Any = dict) -> Any:
    """Reads a JSON file and checks that it has a shape, see `check_shape`.

    Raises:
        OSError, ValueError: as in `read_text` and `parse_json`, or the value has another shape.
    """
    value = parse_json(read_text(path), str(path))
    check_shape(value, shape, str(path))
    return value


def json_lines(path: str | Path) -> Iterator[tuple[str, int, Any]]:
    """Yields (`file:line`, line, value) of a file of JSON lines; skips blank lines.

    Raises:
        OSError, ValueError: as in `read_text` and `parse_json`, for a line of more than `MAX_LINE`
            bytes too.
    """
    path = Path(path)
    check_input(path)
    with path.open("rb") as file:
        line = 0
        while raw := file.readline(MAX_LINE + 1):
            line += 1
            where = f"{path}:{line}"
            if len(raw) > MAX_LINE:
                raise ValueError(f"{where}: expected a line of at most {MAX_LINE >> 20} MiB")
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: expected UTF-8 text, got {error.reason}") from None
            if text:
                yield where, line, parse_json(text, where)


class Between:
    """A shape: a finite number from `low` to `high`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]  # NaN: False


ANY_NUMBER = Between(-1e308, 1e308)
SHARE = Between(-1e-6, 1.0 + 1e-6)
"""A share or probability, up to rounding."""


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Checks a value that was read from JSON.

    Args:
        value: the value.
        shape: a type; `Between`; None for null; object for anything; a tuple of shapes, of which
            one must fit; [shape] for a list of such; {str: shape} for an object with such values;
            {"key": shape, "other?": shape} for an object with these keys, of which those with a "?"
            may be missing. Other keys are allowed.
        where: how an error names the value.

    Raises:
        ValueError: the value has another shape; the message names the place inside the value.
    """
    problem = _misfit(value, shape, "")
    if problem is not None:
        raise ValueError(f"{where}: {problem}")


def _misfit(value: Any, shape: Any, at: str) -> str | None:
    """Returns what does not fit, None if the value has the shape."""
    kind = list if isinstance(shape, list) else dict if isinstance(shape, dict) else None
    if kind is None:
        return None if _fits(value, shape) else f"{_expected(shape, at)}, got {_shown(value)}"
    if not isinstance(value, kind):
        return f"{_expected(kind, at)}, got {_shown(value)}"
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(value, list):
        inner = [(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value)]
    elif str in shape:
        inner = [(item, shape[str], f"{at}.{key}"[:80].lstrip(".")) for key, item in value.items()]
    else:
        for key, wanted in shape.items():
            name = key.removesuffix("?")
            if name in value:
                inner.append((value[name], wanted, f"{at}.{name}".lstrip(".")))
            elif name == key:
                return f"expected the key {f'{at}.{name}'.lstrip('.')!r}, found none"
    problems = (_misfit(*each) for each in inner)
    return next((problem for problem in problems if problem is not None), None)


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_misfit(value, each, "") is None for each in shape)
    if isinstance(shape, Between):
        return value in shape
    if shape is None:
        return value is None
    if isinstance(value, bool) and shape is int:
        return False
    return isinstance(value, shape)


def _expected(shape: Any, at: str) -> str:
    of = f"{at} to be " if at else ""
    return f"expected {of}{_named(shape)}"


def _named(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_named(each) for each in shape)
    if isinstance(shape, Between):
        if shape is ANY_NUMBER:
            return "a finite number"
        return f"a number from {shape.low:g} to {shape.high:g}"
    kind = list if isinstance(shape, list) else dict if isinstance(shape, dict) else shape
    words = {dict: "a JSON object", list: "a list", str: "text", int: "a whole number"}
    return words.get(kind, "null" if kind is None else "true or false")


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return _named(type(value))
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_yaml(text: str, where: str) -> Any:
    """Reads a YAML value of plain data.

    Anchors are refused: with them, a few lines stand for billions of values.

    Raises:
        ValueError: not YAML, an anchor or alias, nested deeper than `MAX_DEPTH`, or more than
            `MAX_YAML` characters.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"{where}: expected at most {MAX_YAML >> 10} KiB of YAML, got more")
    try:
        depth = 0
        for event in yaml.parse(text):
            place = f"{where}:{event.start_mark.line + 1}" if event.start_mark else where
            anchor = getattr(event, "anchor", None)
            if anchor is not None:
                raise ValueError(f"{place}: expected YAML without anchors, got {anchor[:40]!r}")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"{place}: {_TOO_DEEP}")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}{line}: not YAML: {what}") from None
    except RecursionError:
        raise ValueError(f"{where}: {_TOO_DEEP}") from None
    except ValueError as error:  # such as the date 2020-99-99
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: not YAML: {str(error).split(';')[0]}") from None


# Writing


def write_whole(
    path: Path, content: str | bytes | Iterable[str | bytes], *, kind: str = "output"
) -> None:
    """Writes a file beside `path`, syncs it to disk, then renames it to `path`.

    Missing folders are made. Devices and pipes (/dev/stdout) are written directly, because renaming
    would replace them.

    Args:
        path: the file to write; a link is followed.
        content: text, written as UTF-8, or bytes; or parts of them, which are written one by one.
        kind: what the file is. Only a file of this kind that this tool made is replaced.

    Raises:
        OSError: it could not be written, or `path` is somebody else's file. The old file at `path`
            is unchanged.
        ValueError: the text holds half of a surrogate pair.
    """
    parts = _encoded([content] if isinstance(content, str | bytes) else content, path)
    _check_replaceable(path, kind)
    if _is_device(path):
        # Opened anew by its name, a file behind the descriptor would be truncated.
        found = _DESCRIPTOR.fullmatch(str(path))
        number = int(found[1]) if found else _STREAMS.get(str(path))
        opened = path if number is None else number
        with _named_errors(path), open(opened, "wb", closefd=number is None) as device:
            device.writelines(parts)
        return
    target = Path(os.path.realpath(path))
    note = target.parent / RECORDS / target.name
    with _named_errors(path):
        note.parent.mkdir(parents=True, exist_ok=True)
        with _written(target, parts, durable=True) as beside:
            fresh = f"{content_of(beside)} {kind}\n"
            # The old file stays recognisable until the new one has its name.
            old = f"{content_of(target)} {kind}\n" if target.exists() else ""
            with _written(note, [(fresh + old).encode()], durable=False):
                pass


def write_json(path: Path, value: Any, *, kind: str = "output") -> None:
    """Writes a value as JSON, as `write_whole` does."""
    write_whole(path, as_json(value), kind=kind)


def write_json_lines(path: Path, rows: Iterable[Any], *, kind: str = "output") -> None:
    """Writes rows as JSON lines, as `write_whole` does."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, lines, kind=kind)


def as_json(value: Any) -> str:
    """Returns a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def replace_whole(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all, and syncs file and folder to disk.

    It replaces any file; the caller has made sure that it is one of this tool's.

    Raises:
        OSError: it could not be written; the old file at `path` is unchanged.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    with _named_errors(path), _written(path, [content], durable=True):
        pass


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what a killed process was writing, in place of another."""
    return name.endswith(_UNFINISHED)


def _encoded(parts: Iterable[str | bytes], path: Path) -> Iterator[bytes]:
    """Yields each part as bytes, text as UTF-8.

    Raises:
        ValueError: a text has half of a surrogate pair.
    """
    for part in parts:
        try:
            yield part.encode("utf-8") if isinstance(part, str) else part
        except UnicodeEncodeError:
            raise ValueError(f"{path}: expected text, got half of a surrogate pair") from None


@contextmanager
def _written(path: Path, parts: Iterable[bytes], *, durable: bool) -> Iterator[Path]:
    """Writes a file beside `path`, yields it, and gives it the name when the context ends."""
    beside = path.with_name(f".{secrets.token_hex(8)}{_UNFINISHED}")
    try:
        with beside.open("xb") as file:
            file.writelines(parts)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the file that the user asked for."""
    try:
        yield
    except OSError as error:
        if not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk; a file system that cannot do so is not an error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_output(out: str | Path, *inputs: str | Path, kind: str | None = None) -> Path:
    """Checks an output file before the work that leads to it.

    Args:
        out: the file to write.
        inputs: files that are read.
        kind: as in `write_whole`; None for a file that rows are appended to, which
            `ResumableRows` checks.

    Returns:
        The path.

    Raises:
        ValueError: `out` is empty, one of the inputs, or has the name of a file of a model or run.
        OSError: it is a folder, or somebody else's file.
    """
    if not str(out):
        raise ValueError("--out must name a file, got ''")
    path = Path(out)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    folder = next((f for f in path.absolute().parents if f.exists()), path)
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: {folder} must be a folder, got a file")
    if path.exists() and any(Path(x).exists() and path.samefile(x) for x in inputs):
        raise ValueError(f"--out must be another file than the input files, got {path}")
    if _READ_BY_NAME.fullmatch(path.name):
        raise ValueError(f"--out must not be named like a file of a model or a run, got {path}")
    if kind is not None:
        _check_replaceable(path, kind)
    return path


def _check_replaceable(path: Path, kind: str) -> None:
    """Raises OSError if a file exists at `path` that this tool did not make as this kind."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    if _is_device(path) or not path.exists() or path.stat().st_size == 0:
        return
    target = Path(os.path.realpath(path))
    notes: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        notes = (target.parent / RECORDS / target.name).read_text("utf-8").splitlines()
    kinds = [note.partition(" ")[2] for note in notes if note.startswith(content_of(target))]
    if kind not in kinds:
        made = f"compact made it as {kinds[0]}" if kinds else "compact did not make it as it is"
        raise FileExistsError(
            f"{path}: exists, and {made}; choose another name or delete the file first"
        )


def _is_device(path: Path) -> bool:
    """Whether a path is no plain file, or an open file of a process, such as /dev/stdout."""
    opened = str(path).startswith(("/proc/", "/dev/fd/")) or str(path) in _STREAMS
    return opened or (path.exists() and not path.is_file() and not path.is_dir())


# Contents


def content_of(data: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with Path(data).open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def content_of_student(*names: str | Path | None) -> str:
    """Returns a SHA-256, in hexadecimal, that changes when the weights of a student change.

    It covers the name, the size and 65 blocks of 64 KiB, at even distances, of each file of
    weights. Training changes every weight of many matrices, so this is enough, and gigabytes need
    not be read.

    Args:
        names: folders or files of a model and its adapter; a model on the hub counts by its name.
            None adds nothing to the hash.
    """
    found = hashlib.sha256()
    for name in names:
        if not name:
            continue
        path = Path(name)
        if not path.exists():
            found.update(f"{name} ".encode())
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            if not file.is_file() or file.suffix not in _WEIGHTS:
                continue
            with file.open("rb") as content:
                size = file.stat().st_size
                found.update(f"{file.name} {size} ".encode())
                for at in (*range(0, size, max(size // 64, _BLOCK)), max(size - _BLOCK, 0)):
                    content.seek(at)
                    found.update(content.read(_BLOCK))
    return found.hexdigest()
