"""Synthetic sounds to ignore: noise, hum, typing, clocks, knocks, rain, birds, music-like drones, babble.

The rules of synth.py hold: a function of the generator, float32 [S] at 16 kHz, peak of at most 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..config import SAMPLE_RATE
from .synth import Generator, Rng, Sound, fade, log_uniform, normalise, samples, tone


def noise(rng: Rng, seconds: float) -> Sound:
    """Stationary noise with a power spectrum of f^-a, a = 0 (white) .. 2 (brown), and slow swells."""
    n = samples(seconds)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    freq = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE), 20.0)
    y = np.fft.irfft(spectrum * freq ** (-rng.uniform(0, 2) / 2), n)
    return normalise(y * _slow(rng, n, rng.uniform(0, 0.6)))


def _slow(rng: Rng, count: int, depth: float, knots_per_s: float = 1.0) -> np.ndarray:
    """A slowly wandering gain within [1 - depth, 1]."""
    seconds = count / SAMPLE_RATE
    knots = np.arange(0, seconds + 2 / knots_per_s, 1 / knots_per_s)
    return 1 - depth * np.interp(np.arange(count) / SAMPLE_RATE, knots, rng.uniform(0, 1, len(knots)))


def band_noise(rng: Rng, seconds: float) -> Sound:
    """Noise through one broad resonance: water, wind, a fan, traffic."""
    n, centre, width = samples(seconds), log_uniform(rng, 80, 5000), rng.uniform(0.3, 1.2)
    freq = np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE), 1.0)
    shape = np.exp(-0.5 * (np.log(freq / centre) / width) ** 2) + 0.02
    y = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * shape, n)
    return normalise(y * _slow(rng, n, rng.uniform(0, 0.95), rng.uniform(0.5, 4)))


def hum(rng: Rng, seconds: float) -> Sound:
    """Mains or motor hum: 50 or 60 Hz (or a motor's 30..200 Hz) with many harmonics, steady."""
    n = samples(seconds)
    base = float(rng.choice([50.0, 60.0, rng.uniform(30, 200)]))
    amplitudes = rng.uniform(0, 1, 20) / np.arange(1, 21) ** rng.uniform(0.5, 1.5)
    return normalise(tone(base * (1 + 0.002 * rng.standard_normal()), n, amplitudes))


def _scatter(rng: Rng, seconds: float, rate: float, grain: Callable[[], np.ndarray]) -> np.ndarray:
    """Grains at random times, `rate` a second on average, with random gains."""
    n = samples(seconds)
    y = np.zeros(n)
    grains = [grain() for _ in range(8)]
    for first in rng.integers(0, n, rng.poisson(rate * seconds)):
        piece = grains[rng.integers(len(grains))][: n - first]
        y[first : first + len(piece)] += piece * rng.uniform(0.2, 1)
    return y


def clicks(rng: Rng, seconds: float) -> Sound:
    """Typing: short noisy clicks over a dull thump, 2 to 10 a second, in irregular rhythm."""

    def key() -> np.ndarray:
        n = samples(rng.uniform(0.01, 0.04))
        t = np.arange(n) / SAMPLE_RATE
        click = rng.standard_normal(n) * np.exp(-t / rng.uniform(0.001, 0.005))
        body = np.sin(2 * np.pi * rng.uniform(150, 900) * t) * np.exp(-t / 0.008)
        return click + rng.uniform(0, 1) * body

    return normalise(_scatter(rng, seconds, rng.uniform(2, 10), key))


def ticks(rng: Rng, seconds: float) -> Sound:
    """A clock: the same click again and again, exactly in time."""
    n = samples(0.02)
    t = np.arange(n) / SAMPLE_RATE
    tick = np.sin(2 * np.pi * rng.uniform(1500, 5000) * t) * np.exp(-t / rng.uniform(0.0005, 0.003))
    tick += 0.3 * rng.standard_normal(n) * np.exp(-t / 0.001)
    y = np.zeros(samples(seconds))
    for first in np.arange(0, len(y), samples(log_uniform(rng, 0.2, 1.0))):
        piece = tick[: len(y) - first]
        y[first : first + len(piece)] += piece
    return normalise(y)


def knocks(rng: Rng, seconds: float) -> Sound:
    """Knocks, steps, doors: low thumps that die within 0.1 s, with some noise."""

    def thump() -> np.ndarray:
        n = samples(0.25)
        t = np.arange(n) / SAMPLE_RATE
        body = np.sin(2 * np.pi * rng.uniform(50, 400) * t) * np.exp(-t / rng.uniform(0.01, 0.05))
        return body + rng.uniform(0, 0.6) * rng.standard_normal(n) * np.exp(-t / rng.uniform(0.005, 0.04))

    return normalise(_scatter(rng, seconds, rng.uniform(0.5, 4), thump))


def rain(rng: Rng, seconds: float) -> Sound:
    """Dense drops over a bed of high noise."""

    def drop() -> np.ndarray:
        n = samples(0.012)
        t = np.arange(n) / SAMPLE_RATE
        return np.sin(2 * np.pi * rng.uniform(800, 6000) * t) * np.exp(-t / rng.uniform(0.0008, 0.003))

    drops = normalise(_scatter(rng, seconds, log_uniform(rng, 30, 400), drop))
    bed = np.diff(rng.standard_normal(len(drops) + 1))
    return normalise(drops + rng.uniform(0.02, 0.3) * bed * _slow(rng, len(drops), 0.3))


def chirps(rng: Rng, seconds: float) -> Sound:
    """Birds: groups of fast sweeps between 2 and 7 kHz, each 30 to 120 ms long."""

    def chirp() -> np.ndarray:
        n = samples(rng.uniform(0.03, 0.12))
        path = np.linspace(rng.uniform(2000, 7000), rng.uniform(2000, 7000), n)
        wobble = 1 + 0.1 * np.sin(2 * np.pi * rng.uniform(20, 60) * np.arange(n) / SAMPLE_RATE)
        return fade(tone(path * wobble, n, np.array([1.0, 0.1])), 0.01)

    return normalise(_scatter(rng, seconds, rng.uniform(0.5, 4), chirp))


def drone(rng: Rng, seconds: float) -> Sound:
    """Slow music-like chords of low, soft tones that swell over half a second or more."""
    n = samples(seconds)
    y = np.zeros(n)
    root, length = log_uniform(rng, 60, 220), rng.uniform(2, 5)
    for first in range(0, n, samples(length)):
        m = min(samples(length * 1.3), n - first)
        swell = np.sin(np.pi * np.minimum(np.arange(m) / samples(length * 1.3), 1)) ** 2
        for step in rng.choice([0, 3, 4, 5, 7, 9, 12], size=3, replace=False):
            freq = root * 2 ** (step / 12)
            vibrato = 1 + 0.004 * np.sin(2 * np.pi * 5 * np.arange(m) / SAMPLE_RATE)
            y[first : first + m] += swell * tone(freq * vibrato, m, 0.6 ** np.arange(6))
    return normalise(y)


def _syllable(rng: Rng, pitch: float, slope: float) -> np.ndarray:
    """A voiced syllable: harmonics of a gliding pitch under three formants, sometimes led by a hiss."""
    n = samples(rng.uniform(0.09, 0.3))
    track = pitch * np.linspace(1.0, slope, n)
    formants = np.array([rng.uniform(250, 850), rng.uniform(850, 2400), rng.uniform(2300, 3400)])
    harmonics = pitch * np.arange(1, int(4500 / pitch))
    gains = np.array([1.0, 0.5, 0.25])
    shape = (gains / (1 + ((harmonics[:, None] - formants) / 90) ** 2)).sum(axis=1) + 0.005
    y = normalise(fade(tone(track, n, shape), 0.03))
    if rng.random() < 0.4:
        hiss = np.diff(rng.standard_normal(samples(rng.uniform(0.04, 0.12)) + 1))
        y = np.concatenate((0.15 * rng.uniform(0.3, 1) * fade(hiss, 0.01), y))
    return y


def babble(rng: Rng, seconds: float) -> Sound:
    """One to five voices that say nothing: syllables in a talking rhythm, with pauses."""
    n = samples(seconds)
    total = np.zeros(n)
    for _ in range(rng.integers(1, 6)):
        base, at, gain = log_uniform(rng, 85, 280), int(rng.integers(0, samples(0.5))), rng.uniform(0.4, 1)
        while at < n:
            pitch = base * rng.uniform(0.8, 1.3)
            piece = _syllable(rng, pitch, rng.uniform(0.8, 1.15))[: n - at]
            total[at : at + len(piece)] += gain * rng.uniform(0.5, 1) * piece
            at += len(piece) + samples(
                rng.uniform(0.0, 0.06) if rng.random() < 0.8 else rng.uniform(0.2, 0.9)
            )
    return normalise(total)


def silence(rng: Rng, seconds: float) -> Sound:
    """Digital silence."""
    return np.zeros(samples(seconds), dtype=np.float32)


IGNORE: dict[str, Generator] = {
    "noise": noise,
    "band_noise": band_noise,
    "hum": hum,
    "clicks": clicks,
    "ticks": ticks,
    "knocks": knocks,
    "rain": rain,
    "chirps": chirps,
    "drone": drone,
    "babble": babble,
    "silence": silence,
}
