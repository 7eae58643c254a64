"""The batches of a step computed at once on a CPU, in a thread each.

Products of a small model are too short to be split: two cores take 0.44 s for two batches of 64 chunks side
by side, 0.49 to 0.54 s for one after the other (bench/bench_training.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .objective import Batch

Part = tuple[Tensor, Sequence[Tensor | None]]  # losses, gradients


class SideBySide:
    """Gradients of an objective (its first loss), of `at_once` batches at a time. They are added in the order
    of the batches, whichever is ready first: a step is the same to the bit however many are computed at once.
    """

    def __init__(self, objective: nn.Module, at_once: int) -> None:
        """at_once: threads, which share the threads torch has here."""
        self.objective, self.at_once = objective, at_once
        self.moving = [p for p in objective.parameters() if p.requires_grad]
        each = max(1, torch.get_num_threads() // at_once)
        self.threads = ThreadPoolExecutor(at_once, "batch", torch.set_num_threads, (each,))

    def gradients(self, batches: Iterator[Batch], count: int) -> Tensor:
        """Add the mean gradient of the next `count` batches to that of every parameter that moves; returns
        the means of their losses, float32.
        """
        sums: list[Tensor] = []
        waiting: deque[Future[Part]] = deque()
        for _ in range(count):
            if len(waiting) == self.at_once:
                sums.append(self._add(waiting.popleft().result(), count))
            waiting.append(self.threads.submit(self._part, next(batches), count))
        sums += [self._add(part.result(), count) for part in waiting]
        return torch.stack(sums).sum(dim=0)

    def _part(self, batch: Batch, count: int) -> Part:
        losses = self.objective(batch)
        return losses.detach().float(), torch.autograd.grad(losses[0] / count, self.moving, allow_unused=True)

    def _add(self, part: Part, count: int) -> Tensor:
        losses, gradients = part
        for parameter, gradient in zip(self.moving, gradients, strict=True):
            if gradient is not None:  # never added in place: two parameters may be given one tensor
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return losses / count

    def close(self) -> None:
        """End the threads."""
        self.threads.shutdown()
