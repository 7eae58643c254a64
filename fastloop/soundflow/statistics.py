"""Figures with their uncertainty: 95 % intervals of shares (Wilson) and of anything else (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Z95 = 1.959964
RESAMPLES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % interval, and how many things it was counted over. NaN: nothing to count."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Figure(math.nan, math.nan, math.nan, 0)


def share(hits: int, of: int) -> Figure:
    """hits / of with Wilson's interval (Wilson 1927), which holds for few and for extreme counts."""
    if of == 0:
        return NOTHING
    p, z = hits / of, Z95
    centre = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return Figure(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), of)


def bootstrap(
    items: Sequence[T], statistic: Callable[[Sequence[T]], float], n: int | None = None, seed: int = 0
) -> Figure:
    """statistic(items) with the percentiles of its values over resampled items (Efron 1979): streams are
    resampled whole, since what happens within one stream is not independent. n: what is shown as count.
    """
    value = statistic(items) if items else math.nan
    if math.isnan(value):
        return NOTHING
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(items), (RESAMPLES, len(items)))
    found = [statistic([items[i] for i in row]) for row in draws]
    return _figure(value, found, len(items) if n is None else n)


def bootstrap_sums(
    rows: np.ndarray, statistic: Callable[[np.ndarray], float], n: int | None = None, seed: int = 0
) -> Figure:
    """The same of statistic(sum of rows), rows [N, K] of counts: what a corpus is scored by, such as errors
    and words, adds up, and tens of thousands of items are resampled in a second.
    """
    value = statistic(rows.sum(axis=0)) if len(rows) else math.nan
    if math.isnan(value):
        return NOTHING
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(rows), len(rows)), minlength=len(rows))
        found.append(statistic(times @ rows))
    return _figure(value, found, len(rows) if n is None else n)


def _figure(value: float, found: Sequence[float], n: int) -> Figure:
    kept = [x for x in found if not math.isnan(x)]
    low, high = np.percentile(kept, (2.5, 97.5)) if kept else (math.nan, math.nan)
    return Figure(float(value), float(low), float(high), n)
