"""Time-frequency joint preprocessing (TFJP) of clips before they are joined into streams.

    cut_silences -> noise_profile -> denoise -> informative_core -> align          one clip
    join                                                                            two neighbours

The steps are those that the paper of the large model names (arXiv 2606.05121); each is a pure function.
x is float [S] at 16 kHz; a spectrum is complex [frames, BINS], frame k centred on sample HOP k - HOP;
power is |spectrum|^2. Denoising is spectral subtraction (Boll 1979) with a floor (Berouti et al. 1979).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..config import SAMPLE_RATE

WINDOW, HOP = 512, 128  # samples: 32 ms, 8 ms
BINS = WINDOW // 2 + 1
HALF_CHUNK_S = 0.2
LEVEL_BLOCK = 160  # samples over which a level is taken: 10 ms
_TAPER = np.sqrt(np.hanning(WINDOW + 1)[:-1])  # before and after: together a Hann window
_OVERLAP = 2.0  # what the Hann windows of all frames add up to, WINDOW / (2 HOP)
_LEAD = WINDOW - HOP  # zeros before the first sample, so that every sample is in four frames

Spans = tuple[tuple[int, int], ...]  # [first, end) in samples


def stft(x: np.ndarray) -> np.ndarray:
    """[S] -> complex128 [frames, BINS], every sample under four windows."""
    frames = -(-(len(x) + _LEAD) // HOP)
    padded = np.zeros((frames - 1) * HOP + WINDOW)
    padded[_LEAD : _LEAD + len(x)] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    return np.fft.rfft(windows * _TAPER)


def istft(spectrum: np.ndarray, count: int) -> np.ndarray:
    """complex [frames, BINS] -> float64 [count]; the inverse of `stft` of `count` samples."""
    pieces = np.fft.irfft(spectrum, WINDOW) * (_TAPER / _OVERLAP)
    y = np.zeros((len(pieces) + WINDOW // HOP - 1, HOP))
    for part in range(WINDOW // HOP):
        y[part : part + len(pieces)] += pieces[:, part * HOP : (part + 1) * HOP]
    return y.ravel()[_LEAD : _LEAD + count]


def power(spectrum: np.ndarray) -> np.ndarray:
    """|spectrum|^2, float64 [frames, BINS]."""
    return spectrum.real**2 + spectrum.imag**2


# ---- step 1


def _quiet_blocks(x: np.ndarray) -> np.ndarray:
    """bool [blocks of 10 ms]: within 6 dB of the noise floor, at least 20 and at most 40 dB below the
    loudest; where the floor is less than 20 dB down, nothing is quiet.
    """
    blocks = x[: len(x) // LEVEL_BLOCK * LEVEL_BLOCK].reshape(-1, LEVEL_BLOCK)
    level = 10 * np.log10(np.mean(np.square(blocks, dtype=np.float64), axis=1) + 1e-12)
    if len(level) == 0:
        return np.zeros(0, dtype=bool)
    loudest = float(np.percentile(level, 95))
    return level < np.clip(np.percentile(level, 10) + 6, loudest - 40, loudest - 20)


def cut_silences(x: np.ndarray, longest_s: float = 1.0, lap_s: float = 0.032) -> tuple[np.ndarray, Spans]:
    """Shorten every inner silence to longest_s, cut out of its middle -> (sound, what is kept of x).

    Kept pieces overlap by lap_s and are joined as `join` does; see `moved` for times. Silence at either
    end stays: finding the core is another step.
    """
    quiet = np.concatenate(([False], _quiet_blocks(x), [False]))
    edges = np.flatnonzero(np.diff(quiet.astype(np.int8))).reshape(-1, 2) * LEVEL_BLOCK
    keep, lap = round(longest_s * SAMPLE_RATE), round(lap_s * SAMPLE_RATE)
    kept, begin = [], 0
    for first, end in edges:
        inner = first > 0 and end < len(x) // LEVEL_BLOCK * LEVEL_BLOCK
        if inner and end - first > keep + lap:
            half = (keep + lap) // 2
            kept.append((begin, int(first) + half))
            begin = int(end) - (keep + lap - half)
    kept.append((begin, len(x)))
    y = x[kept[0][0] : kept[0][1]]
    for first, end in kept[1:]:
        y = join(y, x[first:end], lap)
    return y, tuple(kept)


def moved(t_s: float, kept: Spans, lap_s: float = 0.032) -> float:
    """Where time t_s of the original is after `cut_silences`; what was cut out is at the join."""
    lap, at = round(lap_s * SAMPLE_RATE) / SAMPLE_RATE, 0.0
    for first, end in kept:
        if t_s * SAMPLE_RATE <= end:
            return at + max(0.0, t_s - first / SAMPLE_RATE)
        at += (end - first) / SAMPLE_RATE - lap
    return at + lap


# ---- steps 2 and 3


def noise_profile(x: np.ndarray, share: float = 0.1, least_frames: int = 4) -> np.ndarray:
    """Mean power of the quietest `share` of the frames that are not digital silence, float64 [BINS].

    Zeros where fewer than least_frames would be averaged, or where they are less than 15 dB below the
    loudest tenth: then there is no pause to hear the noise in, and the sound itself would be taken for it.
    """
    inner = stft(x)[WINDOW // HOP - 1 : len(x) // HOP]  # frames that lie wholly inside
    frames = power(inner)
    energy = frames.sum(axis=1)
    order = np.argsort(energy, kind="stable")
    order = order[energy[order] > 1e-9]
    count = round(share * len(order))
    if count < least_frames:
        return np.zeros(BINS)
    quietest, loudest = energy[order[:count]].mean(), energy[order[-count:]].mean()
    return frames[order[:count]].mean(axis=0) if 31.6 * quietest < loudest else np.zeros(BINS)


def _smooth(p: np.ndarray) -> np.ndarray:
    """Power averaged over 3 frames and 3 bins: a lone loud bin of noise is not taken for sound."""
    padded = np.pad(p, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def denoise(x: np.ndarray, profile: np.ndarray, over: float = 2.0, floor_db: float = -20.0) -> np.ndarray:
    """Subtract `over` times the noise's power from every bin; no bin gets lower than floor_db. [S] -> [S]."""
    spectrum = stft(x)
    left = 1 - over * profile / np.maximum(_smooth(power(spectrum)), 1e-20)
    gain = np.sqrt(np.clip(left, 10 ** (floor_db / 10), 1.0))
    return istft(spectrum * np.where(profile > 0, gain, 1.0), len(x))


# ---- steps 4 and 5


def informative_core(
    x: np.ndarray, profile: np.ndarray, gap_s: float = 0.5, share: float = 0.05
) -> tuple[int, int]:
    """[first, end) in samples of what a clip is about, exact to a window of 32 ms; all of it if nothing is.

    A frame is heard where its power above twice the noise is within 30 dB of the loudest frame's; heard
    frames less than gap_s apart make one run. The core goes from the first to the last run that holds at
    least `share` of the energy of the strongest: a click before or after it is left out.
    """
    excess = np.maximum(power(stft(x)) - 2 * profile, 0).sum(axis=1)
    heard = np.flatnonzero(excess > 1e-3 * excess.max(initial=0.0))
    if len(heard) == 0:
        return 0, len(x)
    breaks = np.flatnonzero(np.diff(heard) > gap_s * SAMPLE_RATE / HOP)
    firsts = heard[np.concatenate(([0], breaks + 1))]
    lasts = heard[np.concatenate((breaks, [len(heard) - 1]))]
    energy = np.array([excess[a : b + 1].sum() for a, b in zip(firsts, lasts, strict=True)])
    strong = np.flatnonzero(energy >= share * energy.max())
    centre = WINDOW // 2 - _LEAD  # of frame 0, in samples of x
    first = int(firsts[strong[0]]) * HOP + centre - HOP
    end = int(lasts[strong[-1]]) * HOP + centre + HOP
    return max(0, first), min(len(x), end)


def align(
    x: np.ndarray, span: tuple[int, int], unit_s: float = HALF_CHUNK_S
) -> tuple[np.ndarray, tuple[int, int]]:
    """The span with what surrounds it, grown to a whole number of units -> (sound, the span in it).

    Half of what is added comes before the span; beyond the ends of x there are zeros.
    """
    unit = round(unit_s * SAMPLE_RATE)
    length = span[1] - span[0]
    added = max(unit, -(-length // unit) * unit) - length
    first = span[0] - added // 2
    y = np.zeros(length + added, dtype=x.dtype)
    begin, end = max(0, first), min(len(x), first + len(y))
    y[begin - first : end - first] = x[begin:end]
    return y, (added // 2, added // 2 + length)


# ---- joins


def join(a: np.ndarray, b: np.ndarray, lap: int) -> np.ndarray:
    """a, then b, overlapping by `lap` samples -> float64 [len(a) + len(b) - lap].

    In the overlap the power of each bin goes from a's to b's along a straight line, with the phase of the
    cross-fade: neither like nor unlike sounds dip or swell, as they do when samples are faded.
    """
    lap = min(lap, len(a), len(b))
    if lap == 0:
        return np.concatenate((a, b)).astype(np.float64)
    tail, head = stft(a[len(a) - lap :]), stft(b[:lap])
    centre = np.arange(len(tail)) * HOP + WINDOW // 2 - _LEAD
    share = np.clip((centre + 0.5) / lap, 0.0, 1.0)[:, None]
    mixed = (1 - share) * tail + share * head
    size = np.sqrt((1 - share) * power(tail) + share * power(head))
    faded = istft(size * np.exp(1j * np.angle(mixed)), lap)
    return np.concatenate((a[: len(a) - lap], faded, b[lap:]))


# ---- one clip


@dataclass(frozen=True)
class Prepared:
    """A clip ready to be joined: whole half chunks of float64 sound, its core [first, end) in samples, and
    the sound after each step, in order, for looking at.
    """

    pcm: np.ndarray
    core: tuple[int, int]
    steps: dict[str, np.ndarray] = field(repr=False)


def prepare(x: np.ndarray) -> Prepared:
    """All steps on one clip, float [S] with S > 0."""
    cut, _ = cut_silences(x)
    profile = noise_profile(cut)
    clean = denoise(cut, profile)
    core = informative_core(clean, noise_profile(clean))
    pcm, inside = align(clean, core)
    steps = {
        "as recorded": np.asarray(x, dtype=np.float64),
        "long silences cut": cut,
        "denoised": clean,
        "informative core": clean[slice(*core)],
        "aligned to half chunks": pcm,
    }
    return Prepared(pcm, inside, steps)
