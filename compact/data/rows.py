"""Opens what rows come in: JSON lines, a JSON array, CSV, Parquet, and data sets of `datasets`.

A source is a file; the folder of a data set that `save_to_disk` wrote; `hub:OWNER/NAME`, with
`:CONFIG` and `@SPLIT` if the data set has several (the split is `train` without it); or rows in
Python. The name of a field counts in any case, with spaces and hyphens as underscores.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from compact.files import (
    MAX_LINE,
    check_depth,
    check_input,
    content_of,
    json_lines,
    read_text,
    without_repeats,
)

HUB = "hub:"
Row = tuple[str, int, Mapping[str, Any]]
"""How an error names the row; its number; its fields. The number is the line in JSON lines, the
place from 1 in other files, and the index from 0 in a data set."""
_TABLES = {".csv": ",", ".tsv": "\t"}
_PEEK = 4096  # bytes
_ROWS = 1024
"""Rows of a Parquet file that are in memory as Python objects at the same time."""
_LIKE_HUB = re.compile(r"[\w-][\w.-]*/[\w-]+")  # OWNER/NAME, and no suffix of a file


def read_rows(source: Any) -> Iterator[Row]:
    """Yields the rows of a source.

    Args:
        source: a path, `hub:...`, a `datasets.Dataset` or a sequence of mappings.

    Raises:
        ValueError: `file:line: ...` or `file: row n: ...` for a row that cannot be read, or two
            names of fields that differ in case only.
        TypeError: the source, or a row in Python, is of another kind.
        OSError: a file cannot be read.
    """
    for where, number, fields in _raw_rows(source):
        if not isinstance(fields, Mapping):
            found = type(fields).__name__
            if isinstance(source, str | Path):
                raise ValueError(f"{where}: expected a JSON object, got {found}")
            raise TypeError(f"{where}: expected a mapping of fields, got {found}")
        yield where, number, _named(fields, where)


def name_of(source: Any) -> str:
    """Returns the name of a source for error messages."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def stem_of(source: str | Path) -> str:
    """Returns a short name: "train" for dir/train.jsonl, "gsm8k" for hub:openai/gsm8k@test."""
    text = str(source)
    if text.startswith(HUB):
        return Path(text.removeprefix(HUB).partition("@")[0].partition(":")[0]).name
    return Path(source).stem


def content_of_rows(source: str | Path) -> str:
    """Returns a SHA-256, in hexadecimal, of a file, or of the rows of a data set."""
    if Path(source).is_file():
        return content_of(source)
    found = hashlib.sha256()
    for _, _, fields in read_rows(source):
        found.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def as_json_lines(source: str | Path, numbers: Container[int]) -> str:
    """Returns the rows with these numbers as JSON lines; a file of JSON lines keeps its text."""
    if _is_json_lines(source):
        # Only "\n" ends a line, as in `json_lines`; reading as text would end one at "\r" too.
        lines = Path(source).read_bytes().decode("utf-8-sig").split("\n")
        kept = [text.rstrip("\r") for number, text in enumerate(lines, 1) if number in numbers]
    else:
        kept = [
            json.dumps(fields, ensure_ascii=False, default=str)  # a date of a table is no JSON
            for _, number, fields in read_rows(source)
            if number in numbers
        ]
    return "".join(text + "\n" for text in kept)


def _raw_rows(source: Any) -> Iterator[tuple[str, int, Any]]:
    if isinstance(source, str | Path):
        path = Path(source)
        if _LIKE_HUB.fullmatch(str(source)) and not path.exists():
            raise FileNotFoundError(f"{source}: no such file; on the hub: {HUB}{source}")
        if str(source).startswith(HUB) or path.is_dir():
            yield from _indexed(_data_set(str(source)), str(source))
        elif path.suffix.lower() in _TABLES:
            yield from _table_rows(path, _TABLES[path.suffix.lower()])
        elif path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
        elif _is_json_lines(source):
            yield from json_lines(path)
        else:
            yield from _array_rows(path)
        return
    indexed = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if isinstance(source, Mapping) or not indexed or hasattr(source, "iloc"):
        raise TypeError(
            "source must be a path, hub:OWNER/NAME, a datasets.Dataset or a sequence of rows, "
            f"got {type(source).__name__}"
        )
    yield from _indexed(source, name_of(source))


def _indexed(rows: Any, name: str) -> Iterator[tuple[str, int, Any]]:
    for index in range(len(rows)):
        yield f"{name} row {index}", index, rows[index]


def field_name(key: object) -> str:
    """Returns the name under which a field is read: lower case, underscores."""
    return str(key).strip().lower().replace(" ", "_").replace("-", "_")


def _named(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns the fields under their names in lower case, with underscores."""
    named = {field_name(k): k for k in fields}
    if len(named) < len(fields):
        twice = next(key for key in fields if key not in named.values())
        raise ValueError(f"{where}: the key {str(twice)[:40]!r} twice, in upper and lower case")
    return {name: fields[key] for name, key in named.items()}


# Files


def _is_json_lines(source: str | Path) -> bool:
    """Whether a file has one JSON object a line: all files do but tables and arrays."""
    path = Path(source)
    if str(source).startswith(HUB) or path.is_dir():
        return False
    check_input(path)
    if path.suffix.lower() in (*_TABLES, ".parquet"):
        return False
    with path.open("rb") as file:
        start = file.read(_PEEK).removeprefix(b"\xef\xbb\xbf")
        while start.isspace():  # a blank file ends with b"", which is no white space
            start = file.read(_PEEK)
    return start.lstrip()[:1] != b"["


def _array_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Yields the rows of one JSON array; errors name the line and the row."""
    text = read_text(path)
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    at = _skip(text, text.index("[") + 1)
    line, counted, number = 1, 0, 0
    while at < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        number += 1
        where = f"{path}:{line}: row {number}"
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: row {number}: expected a JSON object, got {error.msg} at "
                f"column {error.colno}"
            ) from None
        except RecursionError:
            raise ValueError(
                f"{where}: expected a JSON object, got one nested too deeply"
            ) from None
        except ValueError as error:  # a key given twice, or an integer that is too long
            what = str(error).split(";")[0]
            raise ValueError(f"{where}: expected a JSON object, got {what}") from None
        check_depth(row, text[at:end], where)
        yield where, number, row
        at = _skip(text, end)
        line += text.count("\n", counted, at)
        counted = at
        if text[at : at + 1] not in (",", "]"):
            found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
            raise ValueError(f"{path}:{line}: expected ',' or ']' after row {number}, got {found}")
        at = _skip(text, at + 1) if text[at] == "," else at
    if at >= len(text):
        raise ValueError(f"{path}:{line}: expected ']' at the end of the array")
    rest = _skip(text, at + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        found = repr(text[rest : rest + 20])
        raise ValueError(f"{path}:{line}: expected nothing after the array, got {found}")


def _skip(text: str, at: int) -> int:
    """Returns the first position from `at` on that is not white space, or len(text)."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, int, Any]]:
    """Yields the rows of a CSV file with a header; every value is text, an empty one is None."""
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, line = 0, 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: expected a row of CSV, got {error}") from None
        if values is None:
            return
        where, line = f"{path}:{line}", reader.line_num + 1
        if header is None:
            header = values
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{where}: expected names of columns, got {twice[:40]!r} twice")
        elif values:  # a blank line has none
            number += 1
            if len(values) != len(header):
                raise ValueError(
                    f"{where}: expected {len(header)} values as in the header, got {len(values)}"
                )
            yield where, number, {k: v or None for k, v in zip(header, values, strict=True)}


def _parquet_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    import pyarrow
    import pyarrow.parquet

    check_input(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", number, row
    # OSError: "Couldn't deserialize thrift"; ValueError: a name that is not UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected a Parquet file, got {_first_line(error)}") from None


def _data_set(name: str) -> Any:
    """Returns a data set of the hub or of a folder.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
        OSError: the folder holds none.
    """
    import datasets

    spec, _, split = name.partition("@")
    if spec.startswith(HUB) and not spec.removeprefix(HUB).partition(":")[0].strip():
        raise ValueError(f"expected {HUB}OWNER/NAME, got {name!r}")
    split = split or "train"
    try:
        if spec.startswith(HUB):
            path, _, config = spec.removeprefix(HUB).partition(":")
            return datasets.load_dataset(path, config or None, split=split)
        folder = Path(name)
        if not any((folder / x).exists() for x in ("dataset_info.json", "dataset_dict.json")):
            raise IsADirectoryError(
                f"{name}: expected a file, got a directory without a data set of save_to_disk"
            )
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.Dataset):
            return found
        if split not in found:
            raise ValueError(f"expected the split {split!r}, got {', '.join(found)}")
        return found[split]
    except IsADirectoryError:
        raise
    except Exception as error:  # of the library, the hub, its HTTP client or the operating system
        raise ValueError(f"{name}: cannot be read as a data set: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
