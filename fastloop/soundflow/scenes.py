"""Scenes: background + things to ignore + events to answer, mixed at known levels and known times.

A scene is a function of (seed, index): the same pair gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import SAMPLE_RATE
from . import ambience, synth
from .synth import Rng, Sound

GAP_OTHER_S = 1.5  # shortest pause between two events of different classes
GAP_SAME_S = 5.0  # ... of the same class: a shorter pause is the same event going on
LONGEST_S = {"alarm": 20.0, "bell": 4.0, "beep": 2.5}
AUDIBLE = 0.03  # an event ends where it stays below this part of its peak (-30 dB)


@dataclass(frozen=True)
class Event:
    """Something to answer; times in seconds of the stream, exact to the sample."""

    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Scene:
    """pcm float32 [S] within [-1, 1] at 16 kHz, and what is in it."""

    pcm: Sound
    events: tuple[Event, ...]
    background: tuple[str, ...]


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


def audible_end(x: np.ndarray) -> int:
    """Samples until the sound is below -30 dB of its peak for good."""
    heard = np.flatnonzero(np.abs(x) >= AUDIBLE * np.abs(x).max(initial=0.0))
    return int(heard[-1]) + 1 if len(heard) else 0


def _at_level(x: np.ndarray, level_db: float) -> np.ndarray:
    rms = audible_rms(x)
    return x * (10 ** (level_db / 20) / rms) if rms > 0 else x


def event_sound(rng: Rng, label: str, longest_s: float) -> np.ndarray:
    """One event as a room and a microphone pass it on, at most `longest_s` before its tail."""
    if label == "alarm":
        seconds = float(np.exp(rng.uniform(np.log(1.5), np.log(max(1.6, longest_s)))))
    else:
        seconds = longest_s
    x = synth.ANSWER[label](rng, min(seconds, longest_s))
    return tilt(rng, reverb(rng, x) if rng.random() < 0.8 else x)


def _background(rng: Rng, seconds: float) -> tuple[np.ndarray, list[str], float]:
    """A bed through the whole scene and up to three passing distractors -> sound, names, level in dB."""
    level = rng.uniform(-60, -25)
    names = list(ambience.IGNORE)
    bed = str(rng.choice(names))
    y = _at_level(tilt(rng, ambience.IGNORE[bed](rng, seconds)), level)
    if rng.random() < 0.5:  # a second bed: real rooms are never one pure source
        second = str(rng.choice(["noise", "band_noise", "hum"]))
        y = y + _at_level(ambience.IGNORE[second](rng, seconds), level - rng.uniform(0, 20))
        bed = f"{bed}+{second}"
    used = [bed]
    for _ in range(rng.integers(0, 4)):
        name = str(rng.choice([n for n in names if n != "silence"]))
        length = float(np.exp(rng.uniform(np.log(0.4), np.log(8.0))))
        x = tilt(rng, ambience.IGNORE[name](rng, length))
        fade = min(len(x) // 4, int(rng.integers(80, 8000)))
        x[:fade] *= np.linspace(0, 1, fade)
        x[len(x) - fade :] *= np.linspace(1, 0, fade)
        first = int(rng.integers(0, len(y)))
        piece = _at_level(x, level + rng.uniform(-5, 18))[: len(y) - first]
        y[first : first + len(piece)] += piece
        used.append(name)
    return y, used, level


def scene(seed: int, index: int, seconds: float = 25.6, most_events: int = 5) -> Scene:
    """Scene `index` of the endless collection `seed`: `seconds` long, 0..most_events events to answer."""
    rng = np.random.default_rng([seed, index])
    mix, used, level = _background(rng, seconds)
    n = len(mix)
    events: list[Event] = []
    at = rng.uniform(0.0, 6.0)
    for _ in range(rng.integers(0, most_events + 1)):
        label = str(rng.choice(list(synth.ANSWER)))
        if events and label == events[-1].label:
            at = max(at, events[-1].end_s + GAP_SAME_S + rng.uniform(0, 2))
        first = round(at * SAMPLE_RATE)
        room_s = (n - first) / SAMPLE_RATE - 0.5
        if room_s < 1.0:
            break
        x = event_sound(rng, label, min(LONGEST_S[label], room_s))
        loudness = max(level, -55) + rng.uniform(5, 25)
        x = _at_level(x, min(loudness, -9.0))[: n - first]
        mix[first : first + len(x)] += x
        end = first + audible_end(x)
        events.append(Event(label, first / SAMPLE_RATE, end / SAMPLE_RATE))
        at = end / SAMPLE_RATE + GAP_OTHER_S + rng.exponential(3.0)
    peak = float(np.abs(mix).max(initial=0.0))
    pcm = (mix * (0.99 / peak if peak > 0.99 else 1.0)).astype(np.float32)
    return Scene(pcm, tuple(events), tuple(used))


def joined(seed: int, first: int, count: int, seconds: float = 25.6, most_events: int = 5) -> Scene:
    """Scenes first..first + count - 1, one after another as one long stream."""
    parts = [scene(seed, first + i, seconds, most_events) for i in range(count)]
    events, offset = [], 0.0
    for part in parts:
        events += [Event(e.label, e.start_s + offset, e.end_s + offset) for e in part.events]
        offset += len(part.pcm) / SAMPLE_RATE
    used = tuple(name for part in parts for name in part.background)
    return Scene(np.concatenate([part.pcm for part in parts]), tuple(events), used)
