"""The one timer: median, minimum, p99; bytes a second; hot or cold caches; rivals in turn.

What is timed runs with its cache hot (the same arguments again and again) or cold: the arguments named so
(weights, KV pages) are taken in turn from copies that together exceed every cache of the machine, as those of
a model's layers do in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLD_BYTES = 192 << 20  # beyond the last-level cache of any CPU or GPU we meet
MOST_COPIES = 256  # what takes more of them is so small that a whole model of it stays in a cache


@dataclass(frozen=True)
class Timing:
    """Seconds of each call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))

    def gb_per_s(self, moved: int) -> float:
        """Gigabytes a second, at the median."""
        return moved / self.median / 1e9


def side_by_side(
    calls: Mapping[str, Callable[[], object]], rounds: int, block: int = 10
) -> dict[str, Timing]:
    """Blocks of each call in turn, round after round, so that what else the machine does hits all alike.

    The order turns from round to round; the first call of a block warms the caches and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            call, times = calls[name], seconds[name]
            call()
            for _ in range(block):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def rounds_for(call: Callable[[], object], budget_s: float = 0.3, least: int = 10, most: int = 2000) -> int:
    """How many calls fill a budget of time, after one to warm up."""
    call()
    begin = time.perf_counter()
    call()
    return int(np.clip(budget_s / max(time.perf_counter() - begin, 1e-7), least, most))


def rotation(arguments: Mapping[str, Any], cold: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """Arguments that differ in their copies of `cold`, enough to exceed every cache; and whether they do."""
    size = sum(arguments[name].nbytes for name in cold)
    count = -(-COLD_BYTES // size) if size else MOST_COPIES + 1
    if count > MOST_COPIES:
        return [dict(arguments)], False
    copies = [{name: arguments[name].clone() for name in cold} for _ in range(count - 1)]
    return [dict(arguments), *({**arguments, **copy} for copy in copies)], True


def read_bandwidth(device: str = "cpu", repeats: int = 7) -> float:
    """Bytes a second that x . x reads here, from memory: the roof of what moves more than it computes."""
    x = torch.ones(COLD_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        _finished(torch.dot(x, x))
        best = min(best, time.perf_counter() - begin)
    return x.nbytes / best


def _finished(result: Tensor) -> Tensor:
    if result.is_cuda:
        torch.cuda.synchronize()
    return result
