"""Files that may be anything, read with care; directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import FastloopError


class CheckpointError(FastloopError, ValueError):
    """A checkpoint is missing, damaged or of another kind; the message names every part that is wrong."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxdict = 12


def quote(name: object) -> str:
    """A name from a file, fit for a message: escaped, and short whatever the file says."""
    return _SHORT.repr(name)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a small regular file; CheckpointError where it is missing or larger than `limit`."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size} bytes; at most {limit} are plausible for this file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object; CheckpointError where it is not one, or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise CheckpointError(f"{where}: names {quote(name)} twice")
            values[name] = value
        return values

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, huge numbers, deep nesting
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: must be a JSON object, is a {type(values).__name__}")
    return values


def write_text(path: Path, text: str) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(destination: Path, size: int) -> Iterator[Path]:
    """A hidden directory beside `destination` that takes its name once the block has filled it."""
    destination = destination.absolute()
    parent = destination.parent
    partial = parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
    absent = [path for path in (parent, *parent.parents) if not path.exists()]  # innermost first
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise CheckpointError(f"{destination}: exists already; remove it or choose another name")
        parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(parent).free) < size:
            raise CheckpointError(f"{destination}: needs {size} bytes, {free} are free there")
        partial.mkdir()
        yield partial
        _sync_directory(partial)
        partial.rename(destination)
        _sync_directory(parent)
    except OSError as error:
        raise CheckpointError(f"{destination}: not written, and nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already after the rename
        for made in absent:  # only an interrupted call leaves them empty
            with contextlib.suppress(OSError):
                made.rmdir()
