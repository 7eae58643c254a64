"""What an engine reports of itself: counters and latency percentiles."""

from __future__ import annotations

import math
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


@dataclass
class Counters:
    """Counts since the engine started; latencies of the last 4,096 decisions in seconds."""

    sessions_opened: int = 0
    sessions_rejected: int = 0
    steps: int = 0
    rows: int = 0
    chunks: int = 0
    text_tokens: int = 0
    failures: int = 0
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    latency_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    def summary(self) -> dict[str, Any]:
        """Plain data. Copies of the deques are made in one go: a step in another thread appends to them."""
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, deque):
                values = tuple(value)
                shares = {f"p{q}": percentile(values, q) for q in (50, 99)}
                plain[name] = shares | {"max": max(values, default=0.0)}
            else:
                plain[name] = value
        return plain
