"""One safetensors file: a header that is checked before it is believed, data mapped, or written as a stream.

    8 bytes   n, little-endian
    n bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}}; offsets count from its end
    the rest  the tensors, end to end, without holes

Nothing here allocates by a number that the file gives: the header is bounded, and every size in it is
checked against the size of the file. Source: the format's specification (huggingface/safetensors).
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .files import CheckpointError, parse_json, quote

Shape = tuple[int, ...]

MAX_HEADER_BYTES = 16 << 20  # the header of the 3B model is 0.1 MB
_MADV_PAGEOUT = 21  # of Linux 5.4 and newer
ALIGNMENT = 64  # where the data starts: a cache line
PIECE_VALUES = 1 << 18  # values read or checked at a time: 1 MB of float32
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


def map_tensors(file: BinaryIO, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Views of one private mapping of the file: no copy, and memory is taken page by page on first use.

    Writing to such a tensor changes this process's pages, never the file. CheckpointError where a tensor
    does not start on a whole value.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in entries.items():
        if entry.start % entry.dtype.itemsize:
            raise CheckpointError(f"tensor {quote(name)}: starts at byte {entry.start}, not on a whole value")
        flat = torch.frombuffer(mapped, dtype=entry.dtype, count=math.prod(entry.shape), offset=entry.start)
        tensors[name] = flat.view(entry.shape)
    return tensors


def release(tensor: Tensor) -> None:
    """Tell the system that a mapped tensor will not be read soon, so that its pages leave memory.

    They come back from the file when they are read; pages that were written to stay. A hint: where it cannot
    be given, and for tensors with memory of torch's own, nothing happens.
    """
    storage = tensor.untyped_storage()
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or storage.resizable():
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and tensor.is_contiguous():
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_PAGEOUT)


def read_tensor(
    file: BinaryIO, entry: Entry, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """One tensor read into memory of its own, in pieces: nothing else is held but one piece."""
    result = torch.empty(entry.shape, dtype=dtype, device=device)
    flat, itemsize = result.view(-1), entry.dtype.itemsize
    buffer = bytearray(itemsize * min(PIECE_VALUES, flat.numel()))
    file.seek(entry.start)
    for first in range(0, flat.numel(), PIECE_VALUES):
        count = min(PIECE_VALUES, flat.numel() - first)
        if file.readinto(memoryview(buffer)[: count * itemsize]) != count * itemsize:  # type: ignore[attr-defined]
            raise CheckpointError(f"{file.name}: became shorter while it was read")
        flat[first : first + count] = torch.frombuffer(buffer, dtype=entry.dtype, count=count)
    return result


def require_finite(tensor: Tensor, name: str) -> None:
    """CheckpointError where a weight is NaN or infinite, as float16 makes of what is above 65,504."""
    if not all(bool(piece.isfinite().all()) for piece in torch.split(tensor.reshape(-1), PIECE_VALUES)):
        raise CheckpointError(
            f"tensor {quote(name)}: not finite in {tensor.dtype}; choose float32 or bfloat16, "
            "and if that fails too the checkpoint is damaged"
        )


Kind = tuple[torch.dtype, Shape]


def kinds_bytes(kinds: Iterable[Kind]) -> int:
    """Bytes of tensors of these dtypes and shapes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds)


def write_tensors(path: Path, kinds: Mapping[str, Kind], tensors: Iterable[Tensor]) -> None:
    """Write tensors one after another, in the order of `kinds`; only one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in kinds.items():
        end = at + kinds_bytes([(dtype, shape)])
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, (dtype, shape)), tensor in zip(kinds.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
