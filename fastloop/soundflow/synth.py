"""Synthetic sounds to answer: alarms, bells, beeps; and the tools that all generators share.

Every generator returns float32 [S] at 16 kHz with a peak of at most 1 and draws all its parameters
(pitch, timbre, rhythm) from the given `numpy.random.Generator`: the same generator state gives the same
bytes. Sounds to ignore are in ambience.py, rooms and levels in scenes.py, mixing in compose.py. The
recipes are textbook ones: additive and modal synthesis, filtered noise, source-filter vowels (Smith,
"Spectral Audio Signal Processing").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..config import SAMPLE_RATE

Rng = np.random.Generator
Sound = np.ndarray  # float32 [S]
Generator = Callable[[Rng, float], Sound]


def samples(seconds: float) -> int:
    return max(1, round(seconds * SAMPLE_RATE))


def log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def normalise(x: np.ndarray) -> Sound:
    """Peak 1, float32; silence stays silence."""
    peak = float(np.max(np.abs(x), initial=0.0))
    return (x / peak if peak > 0 else x).astype(np.float32)


def fade(x: np.ndarray, seconds: float = 0.005) -> np.ndarray:
    """Raised-cosine attack and release, so that a tone starts without a click."""
    n = min(samples(seconds), len(x) // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.arange(n) / max(n, 1))
    y = x.copy()
    y[:n] *= ramp
    y[len(y) - n :] *= ramp[::-1]
    return y


def tone(freq: np.ndarray | float, count: int, harmonics: np.ndarray) -> np.ndarray:
    """A harmonic tone of `count` samples; freq in Hz, constant or per sample; no partial above 7.6 kHz."""
    track = np.broadcast_to(np.asarray(freq, dtype=np.float64), (count,))
    phase = 2 * np.pi * np.cumsum(track) / SAMPLE_RATE
    top = float(track.max())
    y = np.zeros(count)
    for h, amplitude in enumerate(harmonics, start=1):
        if h * top < 7600:
            y += amplitude * np.sin(h * phase)
    return y


def _reedy(rng: Rng, richness: float) -> np.ndarray:
    """Random amplitudes of 9 harmonics; richness 0 is a sine, 1 is near a square or saw wave."""
    falloff = 1 / np.arange(1, 10)
    amplitudes = falloff * rng.uniform(0.3, 1.0, 9) * richness
    amplitudes[0] = 1.0
    if rng.random() < 0.5:
        amplitudes[1::2] *= 0.1
    return amplitudes


def siren(rng: Rng, seconds: float) -> Sound:
    """A tone that sweeps up and down, or up and up again, between 400 and 2300 Hz."""
    n = samples(seconds)
    t = np.arange(n) / SAMPLE_RATE
    low = rng.uniform(400, 900)
    high = low * rng.uniform(1.5, 2.6)
    period = log_uniform(rng, 0.15, 4.0)
    position = (t / period + rng.uniform(0, 1)) % 1.0
    shape = np.abs(2 * position - 1) if rng.random() < 0.7 else position
    return normalise(fade(tone(low * (high / low) ** shape, n, _reedy(rng, rng.uniform(0.2, 1)))))


def two_tone(rng: Rng, seconds: float) -> Sound:
    """Two tones in turn, each 0.08 to 0.3 s long."""
    n = samples(seconds)
    t = np.arange(n) / SAMPLE_RATE
    low, period = log_uniform(rng, 500, 1800), rng.uniform(0.16, 0.6)
    freq = np.where((t / period) % 1.0 < 0.5, low * rng.uniform(1.15, 1.6), low)
    return normalise(fade(tone(freq, n, _reedy(rng, rng.uniform(0.5, 1)))))


def _piezo(rng: Rng, count: int) -> np.ndarray:
    """The shrill tone of a small sounder, 2.7 to 3.7 kHz."""
    return tone(rng.uniform(2700, 3700), count, _reedy(rng, rng.uniform(0.1, 0.7)))


def _gated(x: np.ndarray, gate: np.ndarray) -> Sound:
    """x where gate is true, with edges of 3 ms."""
    return normalise(x * np.convolve(gate.astype(np.float64), np.hanning(48) / np.hanning(48).sum(), "same"))


def smoke_alarm(rng: Rng, seconds: float) -> Sound:
    """Three shrill beeps and a pause, again and again (the temporal-three pattern of ISO 8201)."""
    n = samples(seconds)
    y = _piezo(rng, n)
    on, gap, pause = rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.5), rng.uniform(0.5, 1.5)
    cycle = np.arange(n) / SAMPLE_RATE % (3 * (on + gap) + pause)
    return _gated(y, (cycle % (on + gap) < on) & (cycle < 3 * (on + gap)))


def pulses(rng: Rng, seconds: float) -> Sound:
    """A shrill tone broken into fast pulses, 3 to 12 a second."""
    n = samples(seconds)
    y = _piezo(rng, n)
    period = log_uniform(rng, 0.08, 0.3)
    return _gated(y, np.arange(n) / SAMPLE_RATE % period < period * rng.uniform(0.4, 0.7))


_BELL_PARTIALS = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.66, 3.01, 4.1, 5.2])


def _strike(rng: Rng, pitch: float, decay: float, count: int) -> np.ndarray:
    """One struck bell: inharmonic partials, the higher ones die faster; decay = time constant in s."""
    t = np.arange(count) / SAMPLE_RATE
    y = np.zeros(count)
    for ratio in _BELL_PARTIALS:
        freq = pitch * ratio * rng.uniform(0.99, 1.01)
        amplitude, speed = rng.uniform(0.1, 1), max(1.0, ratio * rng.uniform(0.6, 1.4))
        if freq < 7600:
            y += amplitude * np.exp(-t * speed / decay) * np.sin(2 * np.pi * freq * t)
    attack = min(count, samples(0.002))
    y[:attack] *= np.linspace(0, 1, attack)
    return y


def bell_of(rng: Rng, seconds: float, kind: str) -> Sound:
    """The bell of a given kind: one, ding_dong, strokes or ringing."""
    n, pitch = samples(seconds), log_uniform(rng, 350, 1600)
    decay = log_uniform(rng, 0.25, 1.2)
    if kind == "one":
        starts, ratios = [0.0], [1.0]
    elif kind == "ding_dong":
        starts, ratios = [0.0, rng.uniform(0.35, 0.8)], [1.0, rng.uniform(0.7, 0.86)]
    elif kind == "strokes":
        every = rng.uniform(0.5, 1.0)
        starts = list(np.arange(rng.integers(2, 5)) * every)
        ratios = [1.0] * len(starts)
    else:
        every, decay = rng.uniform(0.04, 0.07), rng.uniform(0.15, 0.3)
        starts = list(np.arange(0, max(0.5, seconds - 0.8), every))
        ratios = [1.0] * len(starts)
    strikes = {r: _strike(rng, pitch * r, decay, n) for r in dict.fromkeys(ratios)}
    y = np.zeros(n)
    for start, ratio in zip(starts, ratios, strict=True):
        first = round(start * SAMPLE_RATE)
        if first < n:
            y[first:] += strikes[ratio][: n - first] * rng.uniform(0.7, 1)
    return normalise(fade(y, 0.001))


def beep(rng: Rng, seconds: float) -> Sound:
    """One to four short steady tones, as of an appliance; `seconds` is the longest it may take."""
    freq = log_uniform(rng, 600, 2300)
    on = log_uniform(rng, 0.1, 0.5)
    gap = rng.uniform(0.12, 0.4)
    room = max(1, int((seconds + gap) / (on + gap)))
    count = min(room, int(rng.integers(1, 5)))
    harmonics = _reedy(rng, rng.choice([0.0, 0.1, 0.3]))
    pulse = fade(tone(freq, samples(on), harmonics), rng.uniform(0.003, 0.012))
    y = np.zeros(samples(count * (on + gap) - gap))
    for i in range(count):
        first = round(i * (on + gap) * SAMPLE_RATE)
        y[first : first + len(pulse)] += pulse[: len(y) - first]
    return normalise(y)
