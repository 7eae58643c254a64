"""Block sizes, warps and stages: data files, chosen by the device's name; nothing is measured inside a step.

`tables/default.json` serves every device. `tables/<name>.json`, with the name as `torch.cuda.get_device_name`
gives it and `_` for what is no letter or digit, comes first; `bench/gpu_check.py --tune` measures it.

    {"device": "NVIDIA H200",
     "linear": [{"max_rows": 16, "width_in": 2048, "config": {"block_out": 64, ...}}, ...]}

Of an op's entries the first one that matches wins: a key `max_x` is an upper limit of size x, any other key
must be equal. An entry without keys matches everything and ends the list.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent / "tables"


class TableError(ValueError):
    """A table is malformed or has no entry for a call; the message names file, op and sizes."""


def table_path(device_name: str) -> Path:
    """Where the table of a device lies (whether or not there is one)."""
    return TABLES / (re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_") + ".json")


@functools.lru_cache(maxsize=16)
def read(path: Path) -> dict[str, Any]:
    """A table file; TableError says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: {error}") from error
    for op, entries in content.items():
        if isinstance(entries, list) and not all(isinstance(e, dict) and "config" in e for e in entries):
            raise TableError(f"{path}: {op}: an entry has no config")
    return dict(content)


@functools.lru_cache(maxsize=64)
def table(device: torch.device) -> dict[str, Any]:
    """The tables of a device: its own entries in front of the default ones."""
    default = read(TABLES / "default.json")
    own = table_path(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if own is None or not own.exists():
        return default
    merged = default | read(own)
    for op, entries in default.items():
        if isinstance(entries, list):
            merged[op] = [*read(own).get(op, []), *entries]
    return merged


def _matches(entry: dict[str, Any], sizes: dict[str, Any]) -> bool:
    for key, value in entry.items():
        if key == "config":
            continue
        name = key.removeprefix("max_")
        if name not in sizes:
            return False
        if not (sizes[name] <= value if key.startswith("max_") else sizes[name] == value):
            return False
    return True


_overrides: dict[str, dict[str, Any]] = {}  # op -> config; set by `overridden`, for measurements only


@functools.lru_cache(maxsize=4096)
def _choose(op: str, device: torch.device, sizes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    for entry in table(device).get(op, []):
        if _matches(entry, dict(sizes)):
            return dict(entry["config"])
    raise TableError(f"no table entry for op {op} on {device} with {dict(sizes)}; add one to {TABLES}")


def choose(op: str, device: torch.device, **sizes: Any) -> dict[str, Any]:
    """The configuration of a call: keyword arguments of the op's launch. TableError where there is none."""
    if _overrides and op in _overrides:
        return _overrides[op]
    return _choose(op, device, tuple(sizes.items()))


class overridden:
    """`with overridden("linear", config):` measure a configuration that is in no table."""

    def __init__(self, op: str, config: dict[str, Any]) -> None:
        self.op, self.config = op, config

    def __enter__(self) -> None:
        _overrides[self.op] = self.config

    def __exit__(self, *_: object) -> None:
        _overrides.pop(self.op, None)
