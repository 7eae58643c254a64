"""A CUDA driver without a GPU: fake_libcuda.cpp, compiled, in the place of the real one, and what it noted.

Its kernels are those of tests/native/cuda_emulation, so a call goes the whole way from Python through the C
ABI, the plan, the tensor maps and the launch to the threads, on memory of the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastloop.ops.native import require_native

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("fake_libcuda.cpp")
IMAGE = b"\x7fELFfake"
STREAM = 0x5EED


class Driver:
    """The fake one, in the place of libcuda.so.1 for the rest of this process."""

    def __init__(self, path: Path) -> None:
        os.environ["FASTLOOP_LIBCUDA"] = str(path)
        self._library = ctypes.CDLL(str(path))
        self._library.fake_cuda_log.restype = ctypes.c_char_p
        self._library.fake_cuda_seed.argtypes = [ctypes.c_uint64]

    def device(self, major: int, minor: int = 0, processors: int = 132, shared: int = 232_448) -> None:
        """What the devices say they are from now on."""
        self._library.fake_cuda_device(major, minor, processors, shared)

    def seed(self, seed: int) -> None:
        """Of the order in which threads run."""
        self._library.fake_cuda_seed(seed)

    def fail(self, call: str, result: int) -> None:
        """The next call of an entry point gives this result."""
        self._library.fake_cuda_fail(call.encode(), result)

    def events(self) -> list[dict[str, Any]]:
        """What was noted since the last time."""
        text = self._library.fake_cuda_log().decode()
        self._library.fake_cuda_clear()
        return [json.loads(line) for line in text.splitlines()]

    def launches(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if "launch" in event]

    def contexts(self) -> tuple[Callable[[int], int], Callable[[], int]]:
        """push(device) and pop(): a context of a device is current in this thread, as a host may have it."""
        gone = ctypes.c_void_p()
        return (
            lambda device: self._library.cuCtxPushCurrent_v2(ctypes.c_void_p(device + 1)),
            lambda: self._library.cuCtxPopCurrent_v2(ctypes.byref(gone)),
        )

    def counts(self) -> tuple[int, int, int]:
        """(primary contexts held, libraries loaded, contexts current in this thread)."""
        names = ("retained", "loaded", "current")
        return tuple(getattr(self._library, f"fake_cuda_{name}")() for name in names)  # type: ignore[return-value]


@functools.cache
def driver(compiler: str) -> Driver:
    """Compiled once for each state of its sources; the same object for a whole process, as a driver is."""
    includes = [
        SOURCE.with_name("cuda_emulation"),
        *(ROOT / "csrc" / n for n in ("cuda", "common", "include")),
    ]
    sources = [SOURCE, includes[0] / "tensor_map.h", includes[1] / "driver.h"]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastloop-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    target = folder / f"libcuda-{digest}.so"
    if not target.exists():
        made = folder / f"{os.getpid()}.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        command += [*(f"-I{path}" for path in includes), str(SOURCE), "-ldl", "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(target)
    return Driver(target)


@dataclass(frozen=True)
class EmulatedGpu:
    """What fastloop.ops.cuda.Gpu is, over the fake driver: tensors of the CPU are its memory."""

    libraries: dict[str, Path]  # op -> emulation library
    modules: dict[str, Any] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)  # sizes of workspaces
    kept: dict[str, Tensor] = field(default_factory=dict)  # op -> workspace

    def module(self, op: str) -> Any:
        if op not in self.modules:
            image = IMAGE + str(self.libraries[op]).encode() + b"\0"
            self.modules[op] = require_native().cuda.Module(0, image.ljust(16, b"\0"))
        return self.modules[op]

    def stream(self) -> int:
        return STREAM

    def workspace(self, op: str, size: int) -> Tensor | None:
        """One of an op for calls of all sizes, as on a GPU: what they leave, the next ones find."""
        if size == 0:
            return None
        self.asked.append(size)
        if op not in self.kept or self.kept[op].numel() < size:
            whole = torch.zeros(size + 512, dtype=torch.uint8)
            start = -whole.data_ptr() % 256
            self.kept[op] = whole[start : start + size]
        return self.kept[op]


def emulated(emulation: ModuleType, *ops: str) -> EmulatedGpu:
    """Kernels of csrc/cuda compiled by g++."""
    return EmulatedGpu({op: emulation.build_library([ROOT / "csrc" / "cuda" / f"{op}.cu"]) for op in ops})
