"""Augmentation of kept features: what moves a row of a batch to another room and voice, drawn as numbers.

Everything is a function of its generator. Levels add in the log10 of mel power and powers mix, so a kept
stream gives many: louder or softer, through another microphone, from another vocal tract, in other noise.
What is done with these numbers: recipe.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config import HOP_SAMPLES, MEL_BINS, SAMPLE_RATE

REVERBERATION_S = (0.15, 0.6)  # in which the power of a room decays by 60 dB
RING = (0.05, 0.5)  # power of a lasting sound off the walls, to what comes directly
QUIETER_DB = (0.0, 25.0)  # noise, below the row's loudest frame
WARPS = 25  # frequency warps there are


@dataclass(frozen=True)
class Augment:
    """How far a training stream may be moved; the default moves nothing.

    gain_db: least and most gain of a row.
    warp: frequencies of every stream or excerpt times 1 - warp .. 1 + warp (vocal tract length, Jaitly and
        Hinton 2013): a row of 20 excerpts is spoken by 20 voices.
    tilt_db: most slope over the whole band, and as much again of a smooth random curve.
    mix: chance that the noise of a silent stream is added, at 0 to 25 dB below the row's loudest frame.
    narrow: chance that nothing above 4 kHz comes through, as over a telephone.
    mask: chance that two bands of up to 16 bins are blanked (SpecAugment, arXiv 1904.08779).
    room: chance that a row is heard in a room: its powers ring on, exponentially decaying.
    tempo: every second row is played 1 - tempo .. 1 + tempo times as fast, at its own pitch.
    share: of the rows that are moved at all. A rustle or a roar has no pitch or words by which it is known
        in a room, over a telephone or with bands blanked; in a row that is left alone it is.
    """

    gain_db: tuple[float, float] = (0.0, 0.0)
    warp: float = 0.0
    tilt_db: float = 0.0
    mix: float = 0.0
    narrow: float = 0.0
    mask: float = 0.0
    room: float = 0.0
    tempo: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain_db", tuple(self.gain_db))  # a list, where it comes from YAML or JSON


def draw_settings(settings: Augment, rng: np.random.Generator) -> Augment:
    """What one row is moved by: `settings`, or nothing."""
    return settings if settings.share >= 1 or rng.random() < settings.share else Augment()


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1000) / 1000) * 27 / np.log(6.4))


@functools.lru_cache(maxsize=64)
def centres_hz() -> np.ndarray:
    """Centre frequency of each of the mel bins, Hz [C]."""
    top = float(hz_to_mel(np.array(8000.0)))
    return mel_to_hz(np.linspace(0, top, MEL_BINS + 2)[1:-1])


@functools.lru_cache(maxsize=4096)
def warped_from(factor: float) -> np.ndarray:
    """Every frequency times `factor`: float32 [C], the bin, between bins, where what is now in each was."""
    bins = np.arange(MEL_BINS, dtype=np.float64)
    if factor != 1:
        step = float(hz_to_mel(np.array(8000.0))) / (MEL_BINS + 1)
        bins = hz_to_mel(centres_hz() / factor) / step - 1
    return np.clip(bins, 0, MEL_BINS - 1).astype(np.float32)


def draw_voice(settings: Augment, rng: np.random.Generator) -> float:
    """The factor of another vocal tract; 1 is the one that spoke."""
    if settings.warp == 0:
        return 1.0
    steps = int(rng.integers(-(WARPS // 2), WARPS // 2 + 1))
    return 1 + settings.warp * steps / (WARPS // 2)


def draw_tempo(settings: Augment, rng: np.random.Generator) -> float:
    """How fast a row is played; 1 for every second one."""
    if settings.tempo == 0 or rng.random() < 0.5:
        return 1.0
    return float(rng.uniform(1 - settings.tempo, 1 + settings.tempo))


class Room(NamedTuple):
    """Every frame's power comes again, times `decay` from frame to frame; in all `ring` times as much as came
    directly.
    """

    decay: float
    ring: float


class Move(NamedTuple):
    """What is done to a row, in this order.

    narrow: nothing above 4 kHz comes through. room: it is heard in one. level: float32 [C], log10 of power,
    added to each bin. quieter: log10 of power that noise lies below its loudest frame, or None. bands: bins
    first..end that are blanked, two bands, or None.
    """

    narrow: bool
    room: Room | None
    level: np.ndarray
    quieter: float | None
    bands: tuple[tuple[int, int], ...] | None


def draw_room(rng: np.random.Generator) -> Room:
    """A room of any reverberation time."""
    decay = 10 ** (-6 * HOP_SAMPLES / SAMPLE_RATE / rng.uniform(*REVERBERATION_S))
    return Room(float(decay), float(rng.uniform(*RING)))


def draw_move(settings: Augment, rng: np.random.Generator) -> Move:
    """What one row is moved by, as far as `settings` allow."""
    narrow = bool(rng.random() < settings.narrow)
    room = draw_room(rng) if rng.random() < settings.room else None
    level = _microphone(settings, rng) + np.float32(rng.uniform(*settings.gain_db) / 10)
    quieter = float(rng.uniform(*QUIETER_DB)) / 10 if rng.random() < settings.mix else None
    bands = (_band(rng), _band(rng)) if rng.random() < settings.mask else None
    return Move(narrow, room, level, quieter, bands)


def _band(rng: np.random.Generator) -> tuple[int, int]:
    first = int(rng.integers(0, MEL_BINS - 16))
    return first, first + int(rng.integers(0, 17))


def _microphone(settings: Augment, rng: np.random.Generator) -> np.ndarray:
    """A gain for each bin, log10 of power [C]: a slope and a smooth curve."""
    most = settings.tilt_db / 10
    bins = np.arange(MEL_BINS) / (MEL_BINS - 1)
    slope = rng.uniform(-most, most) * (bins - 0.5)
    curve = np.interp(bins, np.linspace(0, 1, 9), rng.uniform(-most / 2, most / 2, 9))
    return (slope + curve).astype(np.float32)
