"""One safetensors file: a header that is checked before it is believed, data mapped, or written as a stream.

    8 bytes   n, little-endian
    n bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}; offsets count from its end
    the rest  the tensors, end to end, without holes

Nothing here allocates by a number that the file gives: the header is bounded, and every size in it is
checked against the size of the file. Source: the format's specification (huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import CheckpointError, parse_json, quote

Shape = tuple[int, ...]

MAX_HEADER_BYTES = 16 << 20  # the header of the 3B model is 0.1 MB
ALIGNMENT = 64  # where the data starts: a cache line
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, end) of the file."""

    dtype: torch.dtype
    shape: Shape
    start: int
    end: int


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _entry(name: str, value: Any, data_start: int, where: str) -> Entry:
    """One line of the header, checked in itself."""
    at = f"{where}: tensor {quote(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{at}: must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{at}: unknown dtype {quote(dtype)}")
    if not _sizes(shape) or len(shape) > 8:
        raise CheckpointError(f"{at}: shape {quote(shape)} is not a short list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{at}: data_offsets {quote(offsets)} are not [begin, end]")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if size != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{at}: shape {quote(shape)} of {dtype} is {size} bytes, data_offsets {quote(offsets)}"
        )
    return Entry(DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def read_header(file: BinaryIO, where: str) -> dict[str, Entry]:
    """Name -> place of every tensor of a safetensors file, in the order of the data.

    CheckpointError unless the tensors fill the file exactly, end to end: no overlap, no hole, no cut.
    """
    total = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > total - 8:
        raise CheckpointError(f"{where}: truncated, or not a safetensors file ({total} bytes)")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: header of {length} bytes; at most {MAX_HEADER_BYTES} are plausible")
    values = parse_json(file.read(length), f"{where}: header")
    values.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length, where) for name, value in values.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    at = 8 + length
    for name, entry in entries.items():
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            raise CheckpointError(f"{where}: tensor {quote(name)} {kind} (byte {entry.start}, not {at})")
        at = entry.end
    if at != total:
        raise CheckpointError(
            f"{where}: the tensors end at byte {at}, the file at {total}: "
            + ("it is cut off; copy it again" if at > total else "it holds bytes that no tensor owns")
        )
    return entries


class MappedTensors:
    """The tensors of a file as views of one private mapping: memory is taken page by page, on first use.

    Writing to such a tensor changes this process's copy, never the file.
    """

    def __init__(self, file: BinaryIO, entries: Mapping[str, Entry]) -> None:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._entries = entries

    def view(self, name: str) -> Tensor:
        """The tensor as it lies in the file, without a copy."""
        entry = self._entries[name]
        if entry.start % entry.dtype.itemsize:
            raise CheckpointError(f"tensor {quote(name)}: starts at byte {entry.start}, not on a whole value")
        count = math.prod(entry.shape)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start).view(
            entry.shape
        )

    def copy(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor in another dtype or on another device; the pages it was read from are given back."""
        entry = self._entries[name]
        copied = self.view(name).to(device=device, dtype=dtype, copy=True)
        if dtype != entry.dtype:
            require_finite(copied, name)
        if hasattr(self._map, "madvise"):
            first = entry.start - entry.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, entry.end - first)
        return copied


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """One tensor of a file, read into memory of its own."""
    buffer = bytearray(entry.end - entry.start)
    with path.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(buffer) != len(buffer):
            raise CheckpointError(f"{path}: became shorter while it was read")
    if not buffer:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)


def require_finite(tensor: Tensor, name: str) -> None:
    """CheckpointError where a weight is NaN or infinite, as float16 makes of what is above 65,504."""
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"tensor {quote(name)}: not finite in {tensor.dtype}; choose float32 or bfloat16, "
            "and if that fails too the checkpoint is damaged"
        )


def write_tensors(
    path: Path, dtype: torch.dtype, shapes: Mapping[str, Shape], tensors: Iterable[Tensor]
) -> None:
    """Write tensors one after another, in the order of `shapes`; only one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
