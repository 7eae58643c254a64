"""Things made ahead of whoever wants them, by processes of their own.

A step of a small model takes a GPU less time than its batch takes a core to draw; a CPU, whose cores the step
has all, gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


ALIGNED = 16  # bytes, where a tensor begins in a packed one


@dataclass(frozen=True)
class Packed:
    """Tensors in one: what goes from process to process as one block of shared memory, and to a GPU as one
    copy (for 20 of them, 1.5 ms of the receiving process in place of 6: bench/bench_training.py).

    data: uint8 [bytes]. kinds: shape and dtype of each.
    """

    data: Tensor
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Packed:
        """They are copied."""
        data = torch.empty(sum(_room(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
        at = 0
        for tensor in tensors:
            data[at : at + tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
            at += _room(tensor.nbytes)
        return Packed(data, tuple((tensor.shape, tensor.dtype) for tensor in tensors))

    def tensors(self) -> list[Tensor]:
        """They share the memory of `data`."""
        found, at = [], 0
        for shape, dtype in self.kinds:
            size = shape.numel() * dtype.itemsize
            found.append(self.data[at : at + size].view(dtype).view(shape))
            at += _room(size)
        return found

    def pin_memory(self) -> Packed:
        """In page-locked memory; what a DataLoader calls."""
        return Packed(self.data.pin_memory(), self.kinds)

    def to(self, device: torch.device) -> Packed:
        """On a device, copied there beside its work where this lies in page-locked memory."""
        return Packed(self.data.to(device, non_blocking=True), self.kinds)


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class _Made(Dataset[T]):
    """What a DataLoader asks for item n."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> T:
        return self.make(number)


def made(
    make: Callable[[int], T], numbers: Sequence[int], workers: int, ahead: int, pin: bool = False
) -> Iterator[T]:
    """make(n) for each n in `numbers`, in order. `workers` processes, forks of this one with a thread each,
    have up to `ahead` ready each; without any, this process makes it when it is asked for. An error is raised
    here, in its turn.

    pin: put tensors into page-locked memory, from which a GPU copies beside its work.
    """
    if workers == 0:
        return map(make, numbers)
    return iter(
        DataLoader(
            _Made(make),
            batch_size=None,  # an item is whole as it is
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=ahead,
            multiprocessing_context="fork",  # what is mapped or held already is not sent
            pin_memory=pin and torch.cuda.is_available(),
        )
    )
