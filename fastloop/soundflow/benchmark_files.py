"""Files that benchmarks come in: JSON, JSON lines, CSV, TSV, Parquet -> rows, each with its place.

A place is FILE:LINE (of Parquet FILE:row N), and an error names it and the field. Sounds of a Parquet file
stay in it until they are played: a set of gigabytes is read a row group at a time.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..audio import AudioError, read
from ..errors import FastloopError

Row = tuple[str, Mapping[str, Any]]  # (place, values)
AUDIO = "audio"  # the column that holds the sound of a row


class BenchmarkError(FastloopError):
    """The manifest, or the sound it names, is not usable; the message names the line and the field."""


@dataclass(frozen=True)
class Cell:
    """A sound inside a Parquet file, as datasets stores it: {bytes, path}."""

    file: Path
    row: int


def samples(sound: Path | Cell) -> np.ndarray:
    """The whole sound, float32 [S] at 16 kHz; AudioError where it cannot be read."""
    if isinstance(sound, Path):
        return np.concatenate([*read(sound)] or [np.zeros(0, np.float32)])
    where = f"{sound.file}:row {sound.row}"
    with tempfile.NamedTemporaryFile() as file:  # libsndfile wants a file of its own
        file.write(_stored(sound, where))
        file.flush()
        try:
            return samples(Path(file.name))
        except AudioError as error:
            raise AudioError(str(error).replace(file.name, where)) from error


def _stored(cell: Cell, where: str) -> bytes:
    starts = _row_groups(cell.file)
    group = max(i for i, start in enumerate(starts) if start <= cell.row)
    value = _audio(cell.file, group)[cell.row - starts[group]].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise AudioError(f"{where}: field {AUDIO!r} holds no sound")
    return data


@functools.cache
def _row_groups(file: Path) -> list[int]:
    """The first row of each group."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    meta = pq.ParquetFile(file).metadata
    counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return [sum(counts[:i]) for i in range(len(counts))]


@functools.lru_cache(maxsize=2)
def _audio(file: Path, group: int) -> Any:
    """The sounds of a row group, encoded."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[AUDIO]).column(0)


def locate(path: Path, patterns: Sequence[str]) -> list[Path]:
    """`path` itself where it is a file; of a folder, the files of the first pattern that fits any."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise BenchmarkError(f"{path}: cannot be read: no such file or directory")
    for pattern in patterns:
        if found := sorted(path.glob(pattern)):
            return found
    raise BenchmarkError(f"{path}: holds none of {', '.join(patterns)}")


def rows(file: Path) -> Iterator[Row]:
    """The rows of a file, by the ending of its name; BenchmarkError names the place that is wrong. JSON may
    be a list or lines, whatever the ending.
    """
    readers = {".json": _json, ".jsonl": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    reader = readers.get(file.suffix)
    if reader is None:
        raise BenchmarkError(f"{file}: is none of {', '.join(readers)}")
    found = False
    for where, values in reader(file):
        if not isinstance(values, dict):
            raise BenchmarkError(f"{where}: must be a JSON object, is a {type(values).__name__}")
        found = True
        yield where, values
    if not found:
        raise BenchmarkError(f"{file}: holds no item")


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # tables are often saved with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{file}: cannot be read: {error}") from error


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = _content(file)
    return _array(file, text) if text.lstrip().startswith("[") else _lines(file, text)


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise BenchmarkError(f"{where}: not valid JSON: {error}") from error


def _array(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, decoded one by one: so each has a line."""
    decoder = json.JSONDecoder()
    at, line = 0, 1

    def skip(expected: str) -> str:
        """Over white space, to a character that is expected; that character."""
        nonlocal at, line
        begun = at
        while at < len(text) and text[at].isspace():
            at += 1
        line += text.count("\n", begun, at)
        if at == len(text) or (expected and text[at] not in expected):
            got = repr(text[at]) if at < len(text) else "the end"
            raise BenchmarkError(f"{file}:{line}: not valid JSON: a list has {got} here")
        return text[at]

    skip("[")
    at += 1
    if skip("") == "]":  # rows() says that it holds no item
        return
    while True:
        skip("")
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise BenchmarkError(f"{file}:{line}: not valid JSON: {error}") from error
        yield f"{file}:{line}", value
        line += text.count("\n", at, end)
        at = end
        closed = skip(",]") == "]"
        at += 1
        if closed:
            break
    if text[at:].strip():
        raise BenchmarkError(f"{file}:{line}: not valid JSON: something follows the list")


def _table(file: Path) -> Iterator[tuple[str, Any]]:
    """CSV, and TSV as CoVoST 2 and Common Voice write it: no quotes, a backslash escapes."""
    text = io.StringIO(_content(file), newline="")
    if file.suffix == ".tsv":
        reader = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    else:
        reader = csv.DictReader(text)
    try:
        for values in reader:
            where = f"{file}:{reader.line_num}"
            if None in values:
                raise BenchmarkError(f"{where}: has more fields than the first line names")
            yield where, values
    except csv.Error as error:
        raise BenchmarkError(f"{file}:{reader.line_num}: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    """All columns but the sounds; values[AUDIO] is the Cell."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name != AUDIO]
        if len(columns) == len(table.schema_arrow.names):
            raise BenchmarkError(f"{file}: field {AUDIO!r} is missing")
        number = 0
        for batch in table.iter_batches(columns=columns):
            for values in batch.to_pylist():
                yield f"{file}:row {number}", values | {AUDIO: Cell(file, number)}
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise BenchmarkError(f"{file}: cannot be read: {error}") from error


def text(row: Row, name: str, *others: str) -> str:
    """A field that must be text, under the first of its names that is there; BenchmarkError names it."""
    where, values = row
    for known in (name, *others):
        if values.get(known) is not None:
            value = values[known]
            if not isinstance(value, str) or not value.strip():
                raise BenchmarkError(f"{where}: field {known!r} must be a string, is {value!r}")
            return value
    got = f"is {values[name]!r}" if name in values else "is missing"
    raise BenchmarkError(f"{where}: field {name!r} must be a string, {got}")


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A field that must be a list of texts, at least one."""
    where, values = row
    value = values.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        got = f"is {value!r}" if name in values else "is missing"
        raise BenchmarkError(f"{where}: field {name!r} must be a list of strings, {got}")
    return tuple(value)
