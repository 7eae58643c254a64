"""The CUDA C++ kernels of csrc/cuda as backend "cuda": each op on tensors of a GPU, on torch's stream.

The compiled part (csrc/include/fastloop_cuda.h) plans and launches; images come from cuda_images.
No op has "cuda" as its default: a kernel becomes one with a results file that shows it right and faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cuda_images import architecture, image
from .dispatch import BackendError, Limits, Op
from .linear import EPILOGUES
from .linear import _check as check_linear
from .native import address, native, reason, require_native, rows_of

BFLOAT16 = (torch.bfloat16,)


@dataclass(frozen=True)
class Gpu:
    """One device as the launches see it: its kernels, its stream, its scratch memory."""

    device: torch.device
    modules: dict[str, Any] = field(default_factory=dict)  # op -> fastloop._native.cuda.Module
    scratch: dict[int, Tensor] = field(default_factory=dict)  # stream -> zeros that its calls share

    def module(self, op: str) -> Any:
        """The op's kernels, loaded with the first call; two threads may load them twice, once too often."""
        if op not in self.modules:
            try:
                cuda = require_native().cuda
                found = cuda.describe(self.device.index)
                code = image(op, architecture(found["major"], found["minor"]))
                self.modules[op] = cuda.Module(self.device.index, code)
            except (ImportError, ValueError) as error:
                raise BackendError(f"op {op}: backend 'cuda' cannot run ({error})") from error
        return self.modules[op]

    def stream(self) -> int:
        """torch's current one."""
        return torch.cuda.current_stream(self.device).cuda_stream

    def workspace(self, size: int) -> Tensor | None:
        """Zeros, which kernels leave as zeros where it matters (their counters); None for no bytes.

        Calls of one stream follow each other, so they share it. A capture gets its own, zeroed by the graph:
        several graphs may be replayed at the same time.
        """
        if size == 0:
            return None
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        stream = self.stream()
        kept = self.scratch.get(stream)
        if kept is None or kept.numel() < size:
            kept = self.scratch[stream] = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return kept


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The one of a device with an index."""
    return Gpu(device)


def gpu_of(op: str, **tensors: Tensor | None) -> Gpu:
    """The GPU that all of them are on; an error names the one that is elsewhere."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    home = next(iter(given.values())).device
    if home.type != "cuda":
        raise BackendError(
            f"{op}: backend 'cuda' runs on CUDA tensors, got {home}; move them or change FASTLOOP_BACKEND"
        )
    for name, tensor in given.items():
        if tensor.device != home:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others on {home}; move one of them")
    return gpu(home)


def linear_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    splits: int = 0,
) -> Tensor:
    """`linear_ref` on a GPU (csrc/cuda/linear.cu), all in bfloat16: x [N, D], weight [O, D], bias [O],
    residual [N, O'] -> y [N, O']. Sums and epilogue are in float32 and rounded once. Any N; made for 1 to 64.

    splits: ranges of the depth that blocks sum apart, for tuning; 0 leaves it to the size of the device.
    """
    width = check_linear(x, weight, bias, epilogue, residual)
    home = gpu_of("linear", x=x, weight=weight, bias=bias, residual=residual)
    if x.dtype != torch.bfloat16:
        raise TypeError(
            f"linear: backend 'cuda' takes torch.bfloat16, got {x.dtype}; convert it with .bfloat16()"
        )
    x, weight = rows_of(x), rows_of(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    y = x.new_empty(x.shape[0], width)
    call = require_native().cuda.Linear(
        module=home.module("linear"),
        rows=x.shape[0],
        in_=x.shape[1],
        out_rows=weight.shape[0],
        x=address(x),
        x_stride=x.stride(0),
        weight=address(weight),
        weight_stride=weight.stride(0),
        bias=address(bias),
        epilogue=EPILOGUES.index(epilogue) % 2,
        gated=epilogue == "silu_gate",
        residual=address(residual),
        residual_stride=0 if residual is None else residual.stride(0),
        out=address(y),
        out_stride=width,
        splits=splits,
    )
    workspace = home.workspace(call.workspace_bytes)
    call.launch(
        workspace=address(workspace),
        workspace_bytes=0 if workspace is None else workspace.numel(),
        dependent=False,
        stream=home.stream(),
    )
    return y


KERNELS: dict[str, tuple[Callable[..., Any], Limits]] = {  # op -> its function, what that takes
    "linear": (linear_cuda, {"x": BFLOAT16}),
}


def register_cuda(ops: Iterable[Op[..., Any]]) -> None:
    """Give the ops that have one their backend "cuda"; or record why there is none."""
    for op in ops:
        if native is None:
            op.unavailable["cuda"] = reason
        elif op.name in KERNELS:
            function, limits = KERNELS[op.name]
            op.register("cuda", function, takes=limits)
