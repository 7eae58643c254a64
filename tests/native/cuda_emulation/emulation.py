"""Kernels of csrc/cuda compiled by g++ and run on the CPU (runtime.h says how), called from Python.

    library = build([ROOT / "csrc/cuda/mel.cu"])
    library.launch("fastloop_mel", grid, block, tensor, 3, 0.5, shared=1024, seed=7)

A tensor stands for its address; numbers are converted to what the kernel's parameter says. What the runtime
finds wrong (a deadlock, a trap, a write behind shared memory) is an EmulationError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNEL = re.compile(r'extern\s+"C"\s+__attribute__\(\(used\)\)\s+void\s+(\w+)\s*\(')  # preprocessed
FLAGS = (
    "-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off",
    "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
    "-Wno-unused-parameter", "-DFASTLOOP_CUDA_EMULATION",
)  # fmt: skip
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")
_NUMBERS = {
    ("i", 1): ctypes.c_int8, ("i", 2): ctypes.c_int16, ("i", 4): ctypes.c_int32, ("i", 8): ctypes.c_int64,
    ("u", 1): ctypes.c_uint8, ("u", 2): ctypes.c_uint16, ("u", 4): ctypes.c_uint32, ("u", 8): ctypes.c_uint64,
    ("f", 4): ctypes.c_float, ("d", 8): ctypes.c_double, ("p", 8): ctypes.c_void_p,
}  # fmt: skip


class EmulationError(RuntimeError):
    """What the runtime found wrong with a launch."""


class _Parameter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_char), ("bytes", ctypes.c_size_t)]


class _Entry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
    ]


class Library:
    """The kernels of some files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._find = self._library.cuda_emulation_find
        self._find.restype, self._find.argtypes = ctypes.POINTER(_Entry), [ctypes.c_char_p]
        self._launch = self._library.cuda_emulation_launch
        self._launch.restype = ctypes.c_char_p
        dims = ctypes.POINTER(ctypes.c_uint)
        self._launch.argtypes = [
            ctypes.c_char_p, dims, dims, ctypes.c_uint, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_uint64, ctypes.c_uint,
        ]  # fmt: skip

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        *arguments: Tensor | float | bytes | None,
        shared: int = 0,
        cluster: int = 1,
        seed: int = 0,
        resident: int = 1,
    ) -> None:
        """grid in blocks, block in threads (1 to 3 numbers each); shared: bytes; cluster: blocks along x;
        resident: clusters that run at the same time. bytes stand for a struct.
        """
        entry = self._find(kernel.encode())
        if not entry:
            raise EmulationError(f"{self.path.name} has no kernel {kernel}")
        values = self._values(kernel, entry.contents.parameters, arguments)
        pointers = (ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(v) for v in values), None)
        problem = self._launch(
            kernel.encode(), _dims(grid), _dims(block), cluster, shared, pointers, seed, resident
        )
        if problem:
            raise EmulationError(f"{kernel}: {problem.decode()}")

    @staticmethod
    def _values(kernel: str, parameters: Any, arguments: Sequence[Any]) -> list[Any]:
        values: list[Any] = []
        for number, argument in enumerate(arguments):
            code, size = parameters[number].code.decode(), parameters[number].bytes
            if code == "\0":
                break
            if isinstance(argument, Tensor) or argument is None:
                if code != "p":
                    raise TypeError(f"{kernel}: parameter {number} is no pointer")
                values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
            elif isinstance(argument, bytes):
                if code != "s" or size != len(argument):
                    raise TypeError(f"{kernel}: parameter {number} is no struct of {len(argument)} bytes")
                values.append(ctypes.create_string_buffer(argument, size))
            else:
                exact = float(argument) if code in "fd" else argument
                values.append(_NUMBERS[code, size](exact))
        if len(values) != len(arguments) or parameters[len(values)].code != b"\0":
            raise TypeError(f"{kernel}: {len(arguments)} arguments do not fit its parameters")
        return values


def _dims(sizes: Sequence[int]) -> Any:
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def compiler() -> str | None:
    """g++ (or what CXX names), or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _scratch() -> Path:
    """Where libraries are kept from run to run; of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"fastloop-cuda-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def build(sources: Sequence[Path], flags: Sequence[str] = (), name: str = "") -> Library:
    """Compile files of kernels into one library, once for each state of csrc/cuda and of this folder."""
    return Library(build_library(sources, flags, name))


def build_library(sources: Sequence[Path], flags: Sequence[str] = (), name: str = "") -> Path:
    """The library's path, for a process that loads it by itself."""
    found = compiler()
    if found is None:
        raise FileNotFoundError("no C++ compiler")
    main = '#include "intrinsics.h"\n#include "library.h"\n' + "".join(
        f'#include "{source}"\n' for source in sources
    )
    headers = [*HERE.glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "csrc/cuda").glob("*.h")]
    digest = hashlib.sha256(repr((main, found, flags, FLAGS)).encode())
    for file in sorted([*headers, *sources]):
        digest.update(file.read_bytes())
    target = _scratch() / f"{name or sources[0].stem}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
            made, driver = Path(folder) / target.name, Path(folder) / "kernels.cpp"
            includes = [f"-I{HERE}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc/include'}"]
            compile_ = [found, *FLAGS, *flags, *includes, str(driver)]
            driver.write_text(main)
            names = KERNEL.findall(_run([*compile_, "-E", "-P"]))
            entries = ", ".join(f"CUDA_EMULATION_ENTRY({name})" for name in names)
            driver.write_text(f"{main}CUDA_EMULATION_LIBRARY({entries})\n")
            _run([*compile_, "-o", str(made)])
            made.replace(target)
    return target


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
    return done.stdout
