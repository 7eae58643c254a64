"""More synthetic sounds: glass, knocks, horns, telephones, clocks that wake; and sounds that resemble alarms.

The rules of synth.py hold: a function of the generator, float32 [S] at 16 kHz, peak of at most 1.
"""

from __future__ import annotations

import numpy as np

from ..config import SAMPLE_RATE
from .synth import Generator, Rng, Sound, bell_of, fade, log_uniform, normalise, samples, tone


def _add(y: np.ndarray, first: int, piece: np.ndarray) -> None:
    """y[first:] += piece, cut where y ends."""
    if first < len(y):
        y[first : first + len(piece)] += piece[: len(y) - first]


def glass_breaking(rng: Rng, seconds: float) -> Sound:
    """A crash of noise, then shards: dozens of high, inharmonic rings that die within a tenth of a second."""
    length = min(seconds, rng.uniform(0.6, 1.6))
    y = np.zeros(samples(length))
    n = samples(0.15)
    t = np.arange(n) / SAMPLE_RATE
    _add(y, 0, 1.5 * np.diff(rng.standard_normal(n + 1)) * np.exp(-t / rng.uniform(0.015, 0.05)))
    _add(y, 0, rng.uniform(0, 1) * np.sin(2 * np.pi * rng.uniform(120, 500) * t) * np.exp(-t / 0.02))
    for _ in range(rng.integers(20, 60)):
        n = samples(rng.uniform(0.05, 0.25))
        t = np.arange(n) / SAMPLE_RATE
        ring = np.exp(-t / rng.uniform(0.008, 0.06)) * np.sin(2 * np.pi * rng.uniform(2200, 7600) * t)
        at = rng.exponential(0.25 * length)
        _add(y, samples(at), ring * rng.uniform(0.1, 0.7) * np.exp(-at / (0.6 * length)))
    return normalise(y)


def door_knock(rng: Rng, seconds: float) -> Sound:
    """Two to six even knocks on wood: one resonance below 700 Hz and a click."""
    every, count = rng.uniform(0.16, 0.4), int(rng.integers(2, 7))
    n = samples(0.2)
    t = np.arange(n) / SAMPLE_RATE
    low, decay = log_uniform(rng, 120, 700), rng.uniform(0.012, 0.035)
    knock = np.sin(2 * np.pi * low * t) * np.exp(-t / decay)
    knock += 0.5 * np.sin(2 * np.pi * low * rng.uniform(1.7, 2.9) * t) * np.exp(-t / (0.5 * decay))
    knock += rng.uniform(0.1, 0.5) * rng.standard_normal(n) * np.exp(-t / 0.003)
    y = np.zeros(samples(min(seconds, every * count + 0.2)))
    for i in range(count):
        _add(y, round(i * every * rng.uniform(0.97, 1.03) * SAMPLE_RATE), knock * rng.uniform(0.6, 1))
    return normalise(y)


def car_horn(rng: Rng, seconds: float) -> Sound:
    """One to four blasts of two reedy tones a third apart, 300 to 600 Hz."""
    low = rng.uniform(300, 500)
    amplitudes = rng.uniform(0.3, 1, 14) / np.arange(1, 15) ** rng.uniform(0.3, 0.9)
    y, at = np.zeros(samples(seconds)), 0.0
    for _ in range(rng.integers(1, 5)):
        n = samples(log_uniform(rng, 0.2, 1.6))
        _add(y, samples(at), fade(tone(low, n, amplitudes) + tone(low * 1.25, n, amplitudes), 0.015))
        at += n / SAMPLE_RATE + rng.uniform(0.1, 0.35)
        if at > seconds - 0.3:
            break
    return normalise(y[: samples(min(at, seconds))])


def clock_alarm(rng: Rng, seconds: float) -> Sound:
    """A digital alarm clock: groups of two to four short beeps, one group a second or so."""
    freq, on = rng.uniform(1000, 2600), rng.uniform(0.04, 0.1)
    gap, beeps, every = on * rng.uniform(0.6, 1.2), int(rng.integers(2, 5)), rng.uniform(0.9, 1.3)
    harmonics = np.array([1.0, 0.1, 0.35, 0.05, 0.15]) * rng.uniform(0.5, 1.0, 5)
    pulse = fade(tone(freq, samples(on), harmonics), 0.004)
    y = np.zeros(samples(seconds))
    for first in np.arange(0.0, seconds, every):
        for i in range(beeps):
            _add(y, round((first + i * (on + gap)) * SAMPLE_RATE), pulse)
    return normalise(y)


def doorbell(rng: Rng, seconds: float) -> Sound:
    """Ding-dong, or now and then a single ding."""
    return bell_of(rng, min(seconds, 3.0), "ding_dong" if rng.random() < 0.8 else "one")


def phone_ring(rng: Rng, seconds: float) -> Sound:
    """An old telephone: bursts of 20 Hz bell strokes; or a warbling electronic one. 1 s on, 1 to 2 s off."""
    on, off = rng.uniform(0.8, 1.6), rng.uniform(0.8, 2.0)
    if rng.random() < 0.5:
        burst = bell_of(rng, on + 0.8, "ringing").astype(np.float64)
    else:
        n, low = samples(on), rng.uniform(700, 1500)
        gate = (np.arange(n) / SAMPLE_RATE * rng.uniform(14, 26)) % 1.0 < 0.5
        burst = fade(tone(np.where(gate, low, low * rng.uniform(1.15, 1.4)), n, np.array([1, 0.2, 0.3])))
    y = np.zeros(samples(seconds))
    for first in np.arange(0.0, seconds, on + off):
        _add(y, round(first * SAMPLE_RATE), burst)
    return normalise(y)


# ---- to be ignored: what could be taken for an alarm


def whistling(rng: Rng, seconds: float) -> Sound:
    """A person whistles: a pure tone that glides from note to note with vibrato, breathy, with pauses."""
    n = samples(seconds)
    notes = 900 * 2 ** (rng.choice([0, 2, 4, 5, 7, 9, 11, 12], size=max(2, int(seconds * 3))) / 12)
    places = np.sort(rng.uniform(0, n, len(notes)))
    width = samples(rng.uniform(0.04, 0.12))
    path = np.convolve(np.interp(np.arange(n), places, notes), np.ones(width) / width, "same")
    path[: width // 2], path[n - width // 2 :] = notes[0], notes[-1]
    vibrato = 1 + rng.uniform(0.003, 0.02) * np.sin(
        2 * np.pi * rng.uniform(4, 7) * np.arange(n) / SAMPLE_RATE
    )
    knots = np.clip(rng.uniform(-0.3, 1.2, max(2, int(seconds * 4))), 0, 1)
    loudness = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(knots)), knots)
    breath = rng.uniform(0.005, 0.05) * np.diff(rng.standard_normal(n + 1))
    return normalise(loudness * (tone(path * vibrato, n, np.array([1.0, 0.03])) + breath))


def melody(rng: Rng, seconds: float) -> Sound:
    """A tune of a plucked or reedy instrument: notes of a scale in rhythm, never one pitch twice."""
    n, beat = samples(seconds), rng.uniform(0.18, 0.5)
    scale = rng.choice([[0, 2, 4, 7, 9], [0, 3, 5, 7, 10], [0, 2, 4, 5, 7, 9, 11]][int(rng.integers(3))], 12)
    harmonics = rng.uniform(0.2, 1, 8) / np.arange(1, 9) ** rng.uniform(0.7, 2)
    root, plucked, y, at, last = log_uniform(rng, 180, 700), rng.random() < 0.6, np.zeros(n), 0.0, None
    while at < seconds:
        step = int(rng.choice(scale)) + 12 * int(rng.integers(0, 2))
        length = beat * float(rng.choice([0.5, 1, 1, 2]))
        if step != last and rng.random() < 0.9:
            m = samples(length * (1.8 if plucked else 1.0))
            t = np.arange(m) / SAMPLE_RATE
            shape = np.exp(-t / rng.uniform(0.15, 0.4)) if plucked else np.ones(m)
            _add(y, samples(at), fade(tone(root * 2 ** (step / 12), m, harmonics) * shape, 0.008))
        at, last = at + length, step
    return normalise(y)


def squeaks(rng: Rng, seconds: float) -> Sound:
    """A hinge, a swing, shoes on a floor: short uneven glides with rough harmonics."""
    y, at = np.zeros(samples(seconds)), 0.0
    while at < seconds:
        n = samples(log_uniform(rng, 0.06, 0.7))
        path = np.linspace(1, rng.uniform(0.6, 1.6), n) * rng.uniform(350, 2200)
        knots = rng.standard_normal(n // 160 + 2)
        rough = 1 + 0.06 * np.interp(np.arange(n), 160 * np.arange(len(knots)), knots)
        harmonics = rng.uniform(0.1, 1, 6) / np.arange(1, 7) ** 0.5
        _add(y, samples(at), fade(tone(path * rough, n, harmonics), 0.02) * rng.uniform(0.3, 1))
        at += n / SAMPLE_RATE + rng.exponential(0.6)
    return normalise(y)


def kettle(rng: Rng, seconds: float) -> Sound:
    """A kettle or a pipe: a hiss whose narrow resonance wanders, near a whistle but never a clean tone."""
    n = samples(seconds)
    centre, spread = rng.uniform(1200, 4000), rng.uniform(60, 300)
    knots = rng.standard_normal(max(2, int(seconds * 5)))
    path = centre * (1 + 0.15 * np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(knots)), knots))
    slow = rng.standard_normal(int(n * spread / SAMPLE_RATE) + 4)  # noise of that bandwidth, Hz
    carrier = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(slow)), slow)
    y = carrier * np.sin(2 * np.pi * np.cumsum(path) / SAMPLE_RATE)
    return normalise(y + rng.uniform(0.02, 0.2) * np.diff(rng.standard_normal(n + 1)))


ALERTS: dict[str, Generator] = {
    "glass_breaking": glass_breaking,
    "door_knock": door_knock,
    "car_horn": car_horn,
    "clock_alarm": clock_alarm,
    "doorbell": doorbell,
    "phone_ring": phone_ring,
}
LOOKALIKES: dict[str, Generator] = {
    "whistling": whistling,
    "melody": melody,
    "squeaks": squeaks,
    "kettle": kettle,
}
