"""Augmentation of kept features: log10 mel power [chunks, F, C] in, the same out, another room and voice.

Everything is a function of its generator. Levels add in this domain and powers mix, so a kept stream gives
many: louder or softer, through another microphone, from another vocal tract, in other noise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from ..config import HOP_SAMPLES, MEL_BINS, SAMPLE_RATE

LN10 = float(np.log(10))
FLOOR = -10.0  # log10 of the least power the mel op gives
REVERBERATION_S = (0.15, 0.6)  # in which the power of a room decays by 60 dB
RING = (0.05, 0.5)  # power of a lasting sound off the walls, to what comes directly
WARPS = 25  # frequency warps that are kept ready


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
def _warp_table(factor: float) -> tuple[Tensor, Tensor]:
    """Bin c of the warped spectrum lies between bins low[c] and low[c] + 1 of the original, at part[c]."""
    step = float(hz_to_mel(np.array(8000.0))) / (MEL_BINS + 1)
    place = np.clip(hz_to_mel(centres_hz() / factor) / step - 1, 0, MEL_BINS - 1.001)
    low = np.floor(place)
    return torch.from_numpy(low.astype(np.int64)), torch.from_numpy((place - low).astype(np.float32))


def warp(raw: Tensor, factor: float) -> Tensor:
    """Every frequency times `factor`: what was at f is now at factor x f."""
    low, part = _warp_table(factor)
    return torch.lerp(raw.index_select(-1, low), raw.index_select(-1, low + 1), part)


def draw_voice(raw: Tensor, settings: Augment, rng: np.random.Generator) -> Tensor:
    """A stream or an excerpt of one, [chunks, F, C], from another vocal tract."""
    if settings.warp == 0:
        return raw
    steps = rng.integers(-(WARPS // 2), WARPS // 2 + 1)
    return warp(raw, float(1 + settings.warp * steps / (WARPS // 2)))


def draw_tempo(settings: Augment, rng: np.random.Generator) -> float:
    """How fast a row is played; 1 for every second one."""
    if settings.tempo == 0 or rng.random() < 0.5:
        return 1.0
    return float(rng.uniform(1 - settings.tempo, 1 + settings.tempo))


def stretch(raw: Tensor, tempo: float, length: int) -> Tensor:
    """raw [chunks, F, C] -> [length, F, C]: frame i is what was at i x tempo, the last one to the end."""
    frames = raw.flatten(0, 1)
    place = (torch.arange(length * raw.shape[1]) * tempo).clamp(max=len(frames) - 1.001)
    low = place.long()
    part = (place - low)[:, None].to(raw.dtype)
    return torch.lerp(frames[low], frames[low + 1], part).unflatten(0, (length, raw.shape[1]))


def mix(raw: Tensor, noise: Tensor, level: float) -> Tensor:
    """The sum of powers; noise is repeated or cut to the same chunks, moved by `level` (log10 of power)."""
    times = -(-len(raw) // len(noise))
    other = noise.repeat(times, 1, 1)[: len(raw)] + level
    return torch.logaddexp(raw * LN10, other * LN10) / LN10


def ring_on(raw: Tensor, reverberation_s: float, ring: float) -> Tensor:
    """raw [chunks, F, C] in a room: every frame's power comes again, decaying by 60 dB in reverberation_s;
    in all `ring` times as much as came directly.
    """
    decay = 10 ** (-6 * HOP_SAMPLES / SAMPLE_RATE / reverberation_s)  # from a frame to the next
    power = torch.exp(raw.flatten(0, 1) * LN10)  # [chunks F, C]
    before, after = np.array([[0, decay], [1, -decay]], dtype=np.float32)
    tail = torch.from_numpy(lfilter(before, after, power.numpy(), axis=0))  # the sum of decay^k, k > 0
    power += tail * (ring * (1 - decay) / decay)
    return power.clamp(min=10**FLOOR).log10().view(raw.shape)


def augment(raw: Tensor, settings: Augment, rng: np.random.Generator, noise: Tensor | None) -> Tensor:
    """One row, log10 mel power [chunks, F, C] -> the same shape, moved as far as `settings` allow.

    noise: raw features of a silent stream, or None.
    """
    if rng.random() < settings.narrow:
        raw = raw.masked_fill(torch.from_numpy(centres_hz() > 4000), FLOOR)
    if rng.random() < settings.room:
        raw = ring_on(raw, float(rng.uniform(*REVERBERATION_S)), float(rng.uniform(*RING)))
    raw = raw + _microphone(settings, rng)
    if noise is not None and rng.random() < settings.mix:
        quieter = rng.uniform(0.0, 2.5)
        level = float(raw.mean(dim=-1).max() - noise.mean(dim=-1).max()) - quieter
        raw = mix(raw, noise, level)
    raw = raw + float(rng.uniform(*settings.gain_db)) / 10
    if rng.random() < settings.mask:
        raw = raw.clone()
        for _ in range(2):
            width, first = int(rng.integers(0, 17)), int(rng.integers(0, MEL_BINS - 16))
            raw[..., first : first + width] = float(raw.mean())
    return raw.clamp(min=FLOOR)


def _microphone(settings: Augment, rng: np.random.Generator) -> Tensor:
    """A gain for each bin, log10 of power [C]: a slope and a smooth curve."""
    most = settings.tilt_db / 10
    bins = np.arange(MEL_BINS) / (MEL_BINS - 1)
    slope = rng.uniform(-most, most) * (bins - 0.5)
    curve = np.interp(bins, np.linspace(0, 1, 9), rng.uniform(-most / 2, most / 2, 9))
    return torch.from_numpy((slope + curve).astype(np.float32))
