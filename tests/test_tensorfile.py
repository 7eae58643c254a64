"""Safetensors headers that lie: nothing is allocated by a number that a file gives, everything is named."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.files import CheckpointError
from fastloop.tensorfile import (
    DTYPES,
    MAX_HEADER_BYTES,
    PIECE_VALUES,
    Entry,
    map_tensors,
    read_header,
    read_tensor,
    release,
    write_tensors,
)


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (bytes, or an object as JSON) and, if given, another length in front."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = (len(encoded) if length is None else length).to_bytes(8, "little")
    path.write_bytes(prefix + encoded + data)
    return path


def header_of(path: Path) -> dict[str, Entry]:
    with path.open("rb") as file:
        return read_header(file, str(path))


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def test_what_the_formats_own_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    held = {"a": torch.randn(3, 5, generator=generator), "b": torch.arange(7, dtype=torch.int16)}
    held |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "half": torch.ones(9).bfloat16()}
    safetensors.torch.save_file(held, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        entries = read_header(file, str(path))
        assert {n: (e.dtype, e.shape) for n, e in entries.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in held.items()
        }
        for name, entry in entries.items():
            assert torch.equal(read_tensor(file, entry, entry.dtype), held[name])


def test_what_we_write_the_formats_own_library_reads(tmp_path: Path) -> None:
    path, generator = tmp_path / "x.safetensors", torch.Generator().manual_seed(0)
    held = {"first": torch.randn(PIECE_VALUES + 3, generator=generator), "second": torch.zeros(2, 0)}
    held["turned"] = torch.randn(4, 3, generator=generator).T
    write_tensors(path, {n: (torch.float32, tuple(t.shape)) for n, t in held.items()}, held.values())
    other = safetensors.torch.load_file(path)
    with path.open("rb") as file:
        entries = read_header(file, str(path))
        assert min(entry.start for entry in entries.values()) % 64 == 0
        mapped = map_tensors(file, {n: e for n, e in entries.items() if e.end > e.start})
        read = {name: read_tensor(file, entry, torch.float32) for name, entry in entries.items()}
    for name, value in held.items():
        assert torch.equal(other[name], value) and torch.equal(read[name], value)
        assert value.numel() == 0 or torch.equal(mapped[name], value)


def resident(name: str) -> int:
    """Bytes of this process that are in memory: RssFile of files, RssAnon of its own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a hint that Linux takes")
def test_released_memory_comes_back_from_the_file(tmp_path: Path) -> None:
    """What was written to stays; memory of torch's own is left alone."""
    path, count = tmp_path / "x.safetensors", 8 << 20
    held = torch.randn(count, generator=torch.Generator().manual_seed(1))
    write_tensors(path, {"a": (torch.float32, (count,))}, [held])
    with path.open("rb") as file:
        mapped = map_tensors(file, read_header(file, str(path)))["a"]
    assert torch.equal(mapped, held)
    mapped[5] = 77.0
    before = resident("RssFile")
    release(mapped)
    assert resident("RssFile") <= before - 3 * count  # of 4 bytes each
    assert mapped[5] == 77.0 and torch.equal(mapped[6:], held[6:])
    release(mapped[1:2])  # less than a page
    before = resident("RssAnon")
    release(held)
    assert abs(resident("RssAnon") - before) < count and torch.equal(mapped[6:], held[6:])


@pytest.mark.parametrize(
    ("shapes", "tensors"),
    [
        ({"a": (2,)}, [torch.zeros(3)]),
        ({"a": (2,)}, [torch.zeros(2).double()]),
        ({"a": (2,)}, []),
        ({"a": (2,)}, [torch.zeros(2)] * 2),
    ],
)
def test_only_what_was_announced_is_written(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], tensors: list[torch.Tensor]
) -> None:
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "x", {n: (torch.float32, s) for n, s in shapes.items()}, tensors)


HUGE = 1 << 62
FITS = tensor([2], 0, 8)
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", "not valid JSON"),
    "a list": ([1], b"", "must be a JSON object"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a number too long to read": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(FITS).encode(),) * 2), bytes(8), "'a' twice"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "nothing else"),
    "more": ({"a": tensor([2], 0, 8, code="x")}, bytes(8), "nothing else"),
    "text": ({"a": "x"}, b"", "nothing else"),
    "dtype": ({"a": tensor([2], 0, 8, "F33")}, bytes(8), "unknown dtype 'F33'"),
    "dtype is a list": ({"a": tensor([2], 0, 8, ["F32"])}, bytes(8), "unknown dtype"),
    "negative size": ({"a": tensor([-2], 0, 8)}, bytes(8), "not a short list of sizes"),
    "fraction": ({"a": tensor([2.0], 0, 8)}, bytes(8), "not a short list of sizes"),
    "truth": ({"a": tensor([True], 0, 4)}, bytes(4), "not a short list of sizes"),
    "many dimensions": ({"a": tensor([1] * 9, 0, 4)}, bytes(4), "not a short list of sizes"),
    "sizes that overflow": ({"a": tensor([HUGE, HUGE, HUGE], 0, 8)}, bytes(8), "data_offsets [0, 8]"),
    "sizes that wrap to the right one": ({"a": tensor([(1 << 62) + 2], 0, 8)}, bytes(8), "data_offsets"),
    "negative offset": ({"a": tensor([2], -8, 0)}, bytes(8), "are not [begin, end]"),
    "backwards": ({"a": tensor([2], 8, 0)}, bytes(8), "are not [begin, end]"),
    "three offsets": ({"a": tensor([2], 0, 8) | {"data_offsets": [0, 8, 8]}}, bytes(8), "[begin, end]"),
    "huge offsets": ({"a": tensor([2], HUGE, HUGE + 8)}, bytes(8), "leaves a hole"),
    "overlap": ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12), "overlaps"),
    "the same place": ({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(8), "overlaps"),
    "hole": ({"a": tensor([2], 0, 8), "b": tensor([2], 12, 20)}, bytes(20), "leaves a hole"),
    "a hole in front": ({"a": tensor([2], 4, 12)}, bytes(12), "leaves a hole"),
    "cut": ({"a": tensor([2], 0, 8)}, bytes(7), "it is cut off; copy it again"),
    "bytes behind": ({"a": tensor([2], 0, 8)}, bytes(9), "bytes that no tensor owns"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, data, told = HEADERS[case]
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        header_of(path)
    assert told in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 700, "a message is short whatever the file says"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 2**31, 2**63 - 1, 2**64 - 1])
def test_a_length_that_lies(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x", b'{"a":1}' if length else b"", length=length)
    with pytest.raises(
        CheckpointError, match=r"truncated, or not a safetensors file|not valid JSON|nothing else"
    ):
        header_of(path)


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_file_shorter_than_its_first_number(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(b"\x01" * size)
    with pytest.raises(CheckpointError, match=r"truncated"):
        header_of(tmp_path / "x")


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """The file is sparse: its header of 128 MB is there."""
    path, length = tmp_path / "x", 128 << 20
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"header of {length} bytes; at most {MAX_HEADER_BYTES}"):
        header_of(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KB


def test_a_tensor_that_begins_inside_a_value_is_not_mapped(tmp_path: Path) -> None:
    header = json.dumps({"a": tensor([2], 0, 8)}).encode()
    path = write(tmp_path / "x", header + b" " * ((1 - len(header)) % 4), bytes(8))
    with path.open("rb") as file:
        entries = read_header(file, "x")
        assert entries["a"].start % 4 == 1
        with pytest.raises(CheckpointError, match=r"'a': starts at byte .*, not on a whole value"):
            map_tensors(file, entries)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(path, {"a": (torch.float32, (10_000,))}, [torch.ones(10_000)])
    with path.open("rb") as file:
        entry = read_header(file, "x")["a"]
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="became shorter"):
            read_tensor(file, entry, torch.float32)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
LIKELY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F31", None]),
        "shape": st.lists(st.integers(-1, 2**64), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@given(header=st.dictionaries(st.text(max_size=4), LIKELY | JSON, max_size=3), data=st.binary(max_size=40))
def test_any_header_is_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "x", header, data)
    try:
        entries = header_of(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    total = path.stat().st_size
    assert sum(entry.end - entry.start for entry in entries.values()) == len(data)
    assert all(0 < entry.start <= entry.end <= total for entry in entries.values())
