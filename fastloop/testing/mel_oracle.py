"""Whisper's log-mel in float64, as an interval that every correct float32 implementation must hit.

The bounds are derived, not tuned. With u = 2^-24 and x the 400 samples of a frame:

- samples times window, the window itself a float32: at most 4 u ||x|| away (2-norm);
- a DFT of N points in float32 errs, over all its outputs together, by at most log2(N) eta ||X||, with eta
  about 6.7 u and ||X|| = sqrt(N) ||x|| (Higham, Accuracy and Stability of Numerical Algorithms, theorem
  24.2). So each amplitude is within delta = (4 + 6.7 log2(400)) u sqrt(400) ||x||;
- a power |X|^2 then moves by at most 2 |X| delta + delta^2; squares and a sum of up to 201 weighted terms add
  at most 210 u of the result;
- maximum, logarithm and clamp are monotone, so they map the two ends; log10 and the affine map round by
  less than 3 units in the last place of numbers below 16.

These are worst cases: white noise errs some fifty times less. A frame that is a sample off, clamps by a wrong
maximum or mirrors wrongly is outside by orders of magnitude. `fastloop.testing.tolerance` bounds the typical
error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import FFT_SAMPLES, HOP_SAMPLES, MEL_BINS
from ..ops.mel import POWER_FLOOR, RANGE_LOG10, mel_filters

Array = NDArray[np.float64]

ROUNDING = 2.0**-24
_AMPLITUDE = (4 + 6.7 * np.log2(FFT_SAMPLES)) * ROUNDING * np.sqrt(FFT_SAMPLES)
_FRAME_SLACK = 3 * 2.0**-20 / 4  # the last place of numbers in [8, 16) is 2^-20; frames are a quarter


@dataclass(frozen=True)
class Interval:
    """low <= value <= high, elementwise, [F, C]."""

    low: Array
    high: Array

    def misses(self, frames: object) -> str:
        """ "" if frames [F, C] are inside; else where the first one is not."""
        values = np.asarray(frames, dtype=np.float64)
        if values.shape != self.low.shape:
            return f"shape {values.shape}, expected {self.low.shape}"
        outside = ~((self.low <= values) & (values <= self.high))  # NaN is outside
        if not outside.any():
            return ""
        f, c = (int(i) for i in np.argwhere(outside)[0])
        return (
            f"{int(outside.sum())} of {values.size} outside; frame {f}, bin {c}: {values[f, c]!r} is not in "
            f"[{self.low[f, c]!r}, {self.high[f, c]!r}]"
        )

    def __getitem__(self, index: slice) -> Interval:
        return Interval(self.low[index], self.high[index])


def log_power(pcm: object, bins: int = MEL_BINS) -> Interval:
    """log10 mel power of all samples, float32 [n] -> [n // 160, C]; both ends mirrored."""
    x = np.asarray(pcm, dtype=np.float64)
    count = len(x) // HOP_SAMPLES
    padded = np.pad(x, FFT_SAMPLES // 2, mode="reflect")
    spans = np.lib.stride_tricks.sliding_window_view(padded, FFT_SAMPLES)[::HOP_SAMPLES][:count]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)
    amplitude = np.abs(np.fft.rfft(spans * window))
    delta = _AMPLITUDE * np.linalg.norm(spans, axis=1, keepdims=True)
    filters = mel_filters(bins=bins)[0].double().numpy().T
    power = amplitude**2 @ filters
    error = (2 * amplitude * delta + delta**2) @ filters + 210 * ROUNDING * power
    low, high = power - error, power + error
    return Interval(np.log10(np.maximum(low, POWER_FLOOR)), np.log10(np.maximum(high, POWER_FLOOR)))


def clamped(y: Interval, top: Interval) -> Interval:
    """log10 mel power -> frames, clamped by the loudest of `top`."""
    low = np.maximum(y.low, top.low.max() - RANGE_LOG10)
    high = np.maximum(y.high, top.high.max() - RANGE_LOG10)
    return Interval((low + 4) / 4 - _FRAME_SLACK, (high + 4) / 4 + _FRAME_SLACK)


def whisper_frames(pcm: object, bins: int = MEL_BINS) -> Interval:
    """Whisper's log-mel of all samples: float32 [n] -> frames [n // 160, C]."""
    y = log_power(pcm, bins)
    return clamped(y, y)
