"""Every implementation of an op as something to call: what tests and benchmarks run over.

Arguments are on the CPU, wherever the implementation runs: they are copied to its device with their strides
and the memory around them, and all of it is copied back, so a test reads the same for every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import BACKENDS_OF, REGISTRY, Op


@dataclass(frozen=True)
class Implementation:
    """One backend of an op on one device."""

    op: str
    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    @property
    def missing(self) -> str:
        """Why it cannot run here, or ""."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return REGISTRY[self.op].unavailable.get(self.backend, "")

    @property
    def function(self) -> Callable[..., Any]:
        """What is registered, for arguments that are on the device."""
        return REGISTRY[self.op].implementations[self.backend]

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether it computes on arguments of a dtype, whatever a single one of them may differ in."""
        limits = REGISTRY[self.op].limits.get(self.backend, {})
        return all(dtype in dtypes for dtypes in limits.values())

    def refusal(self, arguments: Mapping[str, Any]) -> str:
        """Why it does not take a call with these arguments, or ""."""
        return REGISTRY[self.op].refusal(self.backend, (), arguments)

    def __call__(self, **arguments: Any) -> Any:
        """The op on tensors of the CPU; its results are on the CPU too."""
        if self.device == "cpu":
            return self.function(**arguments)
        moved = {name: self.place(value) for name, value in arguments.items()}
        result = self.function(**moved)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                _whole(value).copy_(_whole(moved[name]))
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    def place(self, value: Any) -> Any:
        """A tensor on this device, with its strides and its surroundings; anything else as it is."""
        if not isinstance(value, Tensor) or self.device == "cpu":
            return value
        return _whole(value).to(self.device).as_strided(value.shape, value.stride(), value.storage_offset())


def _whole(tensor: Tensor) -> Tensor:
    """All memory that a tensor is a view of, in one dimension."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def implementations(op: Op[..., Any] | str) -> list[Implementation]:
    """Those that are registered for an op, and those that could not be (with `missing` saying why)."""
    op = REGISTRY[op] if isinstance(op, str) else op
    known = [*op.implementations, *(b for b in op.unavailable if b not in op.implementations)]
    return [
        Implementation(op.name, backend, device)
        for device, backends in BACKENDS_OF.items()
        for backend in backends
        if backend in known
    ]


def copied(arguments: Mapping[str, Any], guard: int = 0) -> dict[str, Any]:
    """Arguments whose tensors are copies, contiguous, with `guard` elements on each side that nobody may
    touch: NaN, or the least integer.
    """
    return {n: fenced(v, guard) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def fenced(tensor: Tensor, guard: int) -> Tensor:
    """A contiguous copy in the middle of a larger memory."""
    count = tensor.numel()
    whole = torch.full((count + 2 * guard,), _sentinel(tensor.dtype), dtype=tensor.dtype)
    inner = whole[guard : guard + count].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def fence_broken(tensor: Tensor, guard: int) -> bool:
    """Whether memory around a tensor of `fenced` has changed."""
    whole, sentinel = _whole(tensor), _sentinel(tensor.dtype)
    around = torch.cat((whole[:guard], whole[len(whole) - guard :]))
    same = around.isnan() if tensor.is_floating_point() else around == sentinel
    return not bool(same.all())


def _sentinel(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min
