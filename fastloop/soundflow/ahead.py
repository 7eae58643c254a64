"""Things made ahead of whoever wants them, by processes of their own.

A step of a small model takes a GPU less time than its batch takes a core to draw; a CPU, whose cores the step
has all, gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


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
