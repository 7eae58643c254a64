"""What the compiler makes of the kernels: registers, spills and shared memory, without a GPU.

    python -m fastloop.triton_kernels.resources --arch 90 [--op linear] [--quick]

Every call that a step of the 3B model makes (fastloop.triton_kernels.calls) is recorded on tensors without
memory, compiled to a cubin, and read with the cuobjdump that comes with triton. One JSON object a line:

    {"op": ..., "call": ..., "kernel": ..., "arch": 90, "registers": 64, "spill_bytes": 0, ...}

spill_bytes is the stack of the kernel: spilled registers and arrays that do not fit into registers alike.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, record_launches

# Shared memory that one block may have, bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTER_LIMIT = 255
FP8_ARCH = 89  # the first architecture that converts float8_e4m3fn
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor."""

    op: str
    call: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def problem(self) -> str:
        """ "" or what is wrong with it."""
        if self.spill_bytes:
            return f"{self.spill_bytes} bytes of stack (spilled registers)"
        if self.registers > REGISTER_LIMIT:
            return f"{self.registers} registers"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"{self.shared_bytes} bytes of shared memory, the device has {SHARED_LIMIT[self.arch]}"
        return ""


def _source(launch: Launch) -> ASTSource:
    """What the just-in-time compiler would see: pointers and sizes that 16 divides, and ones, specialised."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        general = launch.kernel.params[position].do_not_specialize
        if name in launch.constants:
            signature[name] = "constexpr"
        elif value is None or (isinstance(value, int) and value == 1 and not general):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
            aligned[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not general:
                aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _dtypes(launch: Launch) -> set[torch.dtype]:
    return {value.dtype for value in launch.arguments.values() if isinstance(value, Tensor)}


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a recorded launch for sm_<arch>; triton keeps it in its cache."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, static shared bytes) of a cubin's one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"]


def resources(arch: int, ops: list[str] | None = None, quick: bool = False) -> Iterator[Resources]:
    """Every kernel of every call of the 3B model, once, for one architecture; quick: of one stream's step."""
    from .calls import CALLS, QUICK

    seen: set[str] = set()
    for op, calls in CALLS.items():
        if ops and op not in ops:
            continue
        for name in QUICK[op] if quick else calls:
            with record_launches() as launches:
                calls[name]()
            for launch in launches:
                if arch < FP8_ARCH and torch.float8_e4m3fn in _dtypes(launch):
                    continue
                compiled = compile_launch(launch, arch)
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                registers, stack, static = read_cubin(compiled.asm["cubin"])
                shared = max(static, compiled.metadata.shared)
                yield Resources(
                    op, name, launch.kernel.__name__, arch, launch.warps, registers, stack, shared
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT), required=True)
    parser.add_argument("--op", action="append", help="this op only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only the calls of one stream's step")
    chosen = parser.parse_args()
    failed = False
    for arch in chosen.arch:
        for found in resources(arch, chosen.op, chosen.quick):
            print(json.dumps(asdict(found) | {"problem": found.problem}), flush=True)
            failed |= bool(found.problem)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
