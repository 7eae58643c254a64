"""Tensors of a foreign checkpoint, still on disk: safetensors files, or a pickle that the caller trusts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import CheckpointError, parse_json, quote, read_bounded
from ..tensorfile import Entry, Shape, read_header, read_tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class Lazy:
    """A tensor known by its header alone until it is read."""

    dtype: torch.dtype
    shape: Shape
    read: Callable[[torch.dtype], Tensor]  # in the dtype that is asked for


def safetensors_directory(directory: Path) -> dict[str, Lazy]:
    """Name -> tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""
    if (directory / INDEX).is_file():
        return _sharded(directory)
    if (directory / SINGLE).is_file():
        return _file(directory / SINGLE)
    raise CheckpointError(f"{directory}: neither {INDEX} nor {SINGLE}")


def _file(path: Path) -> dict[str, Lazy]:
    try:
        with path.open("rb") as file:
            entries = read_header(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return {name: Lazy(e.dtype, e.shape, partial(_read, path, e)) for name, e in entries.items()}


def _read(path: Path, entry: Entry, dtype: torch.dtype) -> Tensor:
    with path.open("rb") as file:
        return read_tensor(file, entry, dtype)


def _sharded(directory: Path) -> dict[str, Lazy]:
    """All shards together; the index and the shards must agree on where each tensor is."""
    where = str(directory / INDEX)
    weight_map = parse_json(read_bounded(directory / INDEX, MAX_INDEX_BYTES), where).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{where}: no weight_map of tensor names to file names")
    tensors: dict[str, Lazy] = {}
    for shard in sorted(set(weight_map.values())):
        # The index is data: it may name files beside it and nothing else.
        if shard != Path(shard).name or shard in ("", "..") or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{where}: shard {quote(shard)} is not a file name in this directory")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{where}: shard {quote(shard)} is missing; download it again")
        held = _file(directory / shard)
        named = {name for name, home in weight_map.items() if home == shard}
        for name in named.symmetric_difference(held):
            fault = "is not in" if name in named else "is not named by the index but is in"
            raise CheckpointError(f"{where}: tensor {quote(name)} {fault} {quote(shard)}")
        tensors |= held
    return tensors


def pickled_file(path: Path, trusted: bool) -> dict[str, Lazy]:
    """Name -> tensor of a `.pth` that holds a state dict; read by torch's weights-only loader.

    CheckpointError unless `trusted`, and when the pickle wants anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not trusted:
        raise CheckpointError(
            f"{path} is a pickle, and reading a pickle can run code that it holds. If you trust where this "
            "file comes from, say so: `fastloop convert --trust-pickle` (or trust_pickle=True). It is then "
            "read with torch's weights-only loader, which refuses code but has had holes."
        )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise CheckpointError(
            f"{path}: refused by torch's weights-only loader: damaged, or more than tensors in it: {error}"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in state.items()
    ):
        raise CheckpointError(f"{path}: must hold a flat dictionary of names and dense tensors")
    return {name: Lazy(t.dtype, tuple(t.shape), partial(_cast, t)) for name, t in state.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype)
