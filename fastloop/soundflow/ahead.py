"""Batches drawn ahead of the steps that want them, by processes of their own.

A step of a small model takes a GPU less time than its batch takes a core to draw; a CPU, whose cores the step
has all, gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from .objective import Batch

AHEAD = 3  # batches that each process has ready


class _Drawn(Dataset[Batch]):
    """What a DataLoader asks for batch n."""

    def __init__(self, draw: Callable[[int], Batch]) -> None:
        self.draw = draw

    def __getitem__(self, number: int) -> Batch:
        return self.draw(number)


def drawn(draw: Callable[[int], Batch], numbers: Sequence[int], workers: int) -> Iterator[Batch]:
    """draw(n) for each n in `numbers`, in order: by so many processes (forks of this one, a thread each), or
    with 0 by this one when it is asked for. An error of `draw` is raised here, at its batch.
    """
    if workers == 0:
        return map(draw, numbers)
    return iter(
        DataLoader(
            _Drawn(draw),
            batch_size=None,  # an item is a batch already
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=AHEAD,
            multiprocessing_context="fork",  # the features are mapped once, and not sent
            pin_memory=torch.cuda.is_available(),
        )
    )
