"""How a Triton kernel is started. No other file here says `kernel[grid]`.

A step on a GPU may be captured into a graph, so nothing on this path synchronises or reads device memory.
Outputs and scratch come from torch's allocator (`torch.empty`), which a capture serves from its own pool.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..ops.dependent import are_dependent
from ..ops.dispatch import BackendError
from ..ops.triton import FLOATS

INTERPRETED: bool = triton.knobs.runtime.interpret  # fixed when the kernels are decorated
INTERPRETED_PROCESSORS = 8  # what the interpreter says it has: enough for splits to occur in small tests


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what would run, on what. Tensors may be on "meta"."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors and numbers
    constants: dict[str, Any]  # constexpr arguments
    warps: int
    stages: int


_recorder: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside, kernels do not run: their launches are listed. Tensors on "meta" are accepted then."""
    launches: list[Launch] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def accept(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that no kernel here can read: another device than the first one's, no GPU at all, or a
    floating-point dtype without a kernel.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    home = next(iter(given.values())).device
    if home.type != "cuda" and not INTERPRETED and _recorder.get() is None:
        raise BackendError(
            f"{op}: backend 'triton' runs on CUDA tensors, got {home}. Move them, change FASTLOOP_BACKEND, "
            "or set TRITON_INTERPRET=1 before the first import of triton to interpret the kernels on the CPU."
        )
    for name, tensor in given.items():
        if tensor.device != home:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {home}; move one of them")
        if tensor.dtype.is_floating_point and tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: backend 'triton' takes {name} in {FLOATS}, got {tensor.dtype}; convert it, or use "
                "the backend 'reference'"
            )


FLOAT8 = (8, 9)  # the first compute capability that converts float8_e4m3fn


def accept_float8(op: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor; if it is float8_e4m3fn, as bytes for `accept`. Refused on a GPU that cannot convert it."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    if tensor.device.type == "cuda" and (found := torch.cuda.get_device_capability(tensor.device)) < FLOAT8:
        raise BackendError(
            f"{op}: backend 'triton' takes {name} in float8_e4m3fn from sm_89 on, {tensor.device} is "
            f"sm_{found[0]}{found[1]}; use the backend 'reference', or another precision"
        )
    return tensor.view(torch.uint8)


def rows_apart(tensor: Tensor) -> Tensor:
    """[N, W] whose last dimension is contiguous; a copy only where it is not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS if INTERPRETED else 132  # recorded launches: those of an H100 or H200
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _can_depend(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Tensor | int | float | None,
    warps: int = 4,
    stages: int = 2,
    **constants: Any,
) -> None:
    """Start `kernel` on the current stream of its first argument's device. An empty grid starts nothing.

    constants: the kernel's constexpr arguments, DEPENDENT excepted, which is decided here.
    """
    if 0 in grid:
        return
    device = arguments[0].device  # type: ignore[union-attr]
    recorder = _recorder.get()
    if recorder is not None:
        names = [name for name in kernel.arg_names if name not in constants and name != "DEPENDENT"]
        named = dict(zip(names, arguments, strict=True))
        depends = constants | {"DEPENDENT": are_dependent()}
        recorder.append(Launch(kernel, grid, named, depends, warps, stages))
        return
    dependent = are_dependent() and _can_depend(device)
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if dependent:
        options["launch_pdl"] = True
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, DEPENDENT=dependent, **constants, **options)
    else:
        kernel[grid](*arguments, DEPENDENT=dependent, **constants, **options)
