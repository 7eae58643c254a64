"""What rooms and microphones do to a sound, and how loud and how long it is."""

from __future__ import annotations

import numpy as np

from ..config import SAMPLE_RATE
from .synth import Rng

GAP_SAME_S = 5.0  # shortest pause between two events of one class: a shorter one is the same event going on
AUDIBLE = 0.03  # an event ends where it stays below this part of its peak (-30 dB)


def reverb(rng: Rng, x: np.ndarray) -> np.ndarray:
    """A room: the sound plus exponentially decaying noise as its tail; a longer result."""
    rt60, wet = rng.uniform(0.1, 0.7), rng.uniform(0.0, 0.4)
    tail = rng.standard_normal(round(rt60 * SAMPLE_RATE)) * 10 ** (
        -3 * np.arange(round(rt60 * SAMPLE_RATE)) / (rt60 * SAMPLE_RATE)
    )
    impulse = np.concatenate(([1.0], wet * tail / np.sqrt(np.sum(tail**2))))
    return _convolve(x, impulse)


def _convolve(x: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    n = len(x) + len(impulse) - 1
    size = 1 << (n - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(impulse, size), size)[:n]


def tilt(rng: Rng, x: np.ndarray) -> np.ndarray:
    """A microphone: a random slope of at most 4 dB per octave around 1 kHz, and now and then a low-pass."""
    spectrum = np.fft.rfft(x)
    freq = np.maximum(np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), 50.0)
    spectrum *= (freq / 1000) ** rng.uniform(-0.66, 0.66)
    if rng.random() < 0.25:
        spectrum /= np.sqrt(1 + (freq / rng.uniform(3500, 6000)) ** 8)
    return np.fft.irfft(spectrum, len(x))


def audible_rms(x: np.ndarray) -> float:
    """Root mean square over the blocks of 20 ms that are within 20 dB of the loudest."""
    blocks = x[: len(x) // 320 * 320].reshape(-1, 320) if len(x) >= 320 else x[None]
    power = np.mean(np.square(blocks, dtype=np.float64), axis=1)
    loud = power[power >= 0.01 * power.max(initial=0.0)]
    return float(np.sqrt(loud.mean())) if len(loud) else 0.0
