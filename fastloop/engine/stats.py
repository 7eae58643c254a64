"""What an engine reports of itself: counters and latency percentiles."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


def percentile(values: Iterable[float], q: float) -> float:
    """The q-th percentile (0..100), nearest rank; 0.0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


class Recent:
    """The last `most` of many values. A step adds to them while other threads read: a deque that is appended
    to while it is copied raises RuntimeError, where the copy makes room for a collection of garbage between.
    """

    def __init__(self, most: int) -> None:
        self._values: deque[float] = deque(maxlen=most)
        self._lock = threading.Lock()

    def add(self, *values: float) -> None:
        with self._lock:
            self._values.extend(values)

    def values(self) -> list[float]:
        """A copy, the oldest first."""
        with self._lock:
            return list(self._values)

    def summary(self) -> dict[str, float]:
        """Percentiles 50 and 99, and the maximum; 0.0 of nothing."""
        values = self.values()
        return {"p50": percentile(values, 50), "p99": percentile(values, 99), "max": max(values, default=0.0)}


KEPT = 4096  # seconds of steps and of decisions, each


@dataclass
class Counters:
    """Counts since the engine started, and seconds of the last steps and from a chunk to its decision."""

    sessions_opened: int = 0
    sessions_rejected: int = 0
    steps: int = 0
    rows: int = 0
    chunks: int = 0
    text_tokens: int = 0
    failures: int = 0
    step_seconds: Recent = field(default_factory=lambda: Recent(KEPT))
    latency_seconds: Recent = field(default_factory=lambda: Recent(KEPT))

    def summary(self) -> dict[str, Any]:
        """Plain data, in any thread."""
        return {
            name: value.summary() if isinstance(value, Recent) else value
            for name, value in vars(self).items()
        }
