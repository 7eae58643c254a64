"""How the frames of a batch are made of kept ones: drawn as numbers, a few bytes a frame, by whoever draws
the batch; made of them where the kept frames lie, which may be a GPU.

    kept frames -> joined pieces, each in its voice -> rows, each at its tempo -> each in its room, noise, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import HOP_SAMPLES, MEL_BINS, SAMPLE_RATE
from .augment import REVERBERATION_S, Move, centres_hz, warped_from
from .features import clamp

LN10 = float(np.log(10))
FLOOR = -10.0  # log10 of the least power the mel op gives
NARROW_HZ = 4000
REACH = round(1.5 * REVERBERATION_S[1] * SAMPLE_RATE / HOP_SAMPLES)  # frames that ring on, for 90 dB at least


class Piece(NamedTuple):
    """Kept frames from `first` on, every frequency times `voice`."""

    first: int
    frames: int
    voice: float = 1.0


@dataclass(frozen=True)
class Row:
    """One row: pieces, one behind the other, played `tempo` times as fast and moved; noise: the piece that is
    mixed in, as often as it takes, if the move says so.
    """

    pieces: Sequence[Piece]
    tempo: float
    move: Move
    noise: Piece | None = None


class Recipe(NamedTuple):
    """B rows of T frames of C bins, made of J joined frames.

    source int32 [J]: the kept frame; voice uint8 [J]: its row of warps float32 [V, C], which tells the bin
    that each bin is heard from.
    place int32, part float32 [B, T]: a frame lies this part of the way from the joined frame `place` to
    `place` + 1.
    narrow int64 [N]: rows of which nothing above 4 kHz comes through. level float32 [B, C].
    roomy int64 [R]: rows that are heard in a room; rooms float32 [R, 2]: Room of each.
    noisy int64 [M]: rows with noise; noise int32 [M, T]: its kept frames; quieter float32 [M].
    banded int64 [K]: rows with blanked bands; bands int64 [K, 2, 2]: first and end of both.
    """

    source: Tensor
    voice: Tensor
    warps: Tensor
    place: Tensor
    part: Tensor
    narrow: Tensor
    level: Tensor
    roomy: Tensor
    rooms: Tensor
    noisy: Tensor
    noise: Tensor
    quieter: Tensor
    banded: Tensor
    bands: Tensor


def recipe(rows: Sequence[Row], frames: int) -> Recipe:
    """Rows of `frames` frames each, whose pieces hold at least as many at their tempo."""
    voices: dict[float, int] = {}
    sources, spoken, places = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    joined = 0
    for row in rows:
        first, wanted = joined, joined + math.ceil(frames * row.tempo) + 1
        for piece in row.pieces:
            count = min(piece.frames, wanted - joined)
            sources.append(np.arange(piece.first, piece.first + count, dtype=np.int32))
            voice = voices.setdefault(piece.voice, len(voices))
            spoken.append(np.full(count, voice, dtype=np.uint8))
            joined += count
        places.append(np.minimum(first + np.arange(frames) * row.tempo, joined - 1))
    place = np.array(places)
    low = np.floor(place)
    narrow = [i for i, row in enumerate(rows) if row.move.narrow]
    bands = {i: row.move.bands for i, row in enumerate(rows) if row.move.bands is not None}
    rooms = {i: row.move.room for i, row in enumerate(rows) if row.move.room is not None}
    noises = {
        i: (row.noise, row.move.quieter)
        for i, row in enumerate(rows)
        if row.noise is not None and row.move.quieter is not None
    }
    noise = [piece.first + np.arange(frames) % piece.frames for piece, _ in noises.values()]
    return Recipe(
        source=torch.from_numpy(np.concatenate(sources)),
        voice=torch.from_numpy(np.concatenate(spoken)),
        warps=torch.from_numpy(np.array([warped_from(voice) for voice in voices])),
        place=torch.from_numpy(low.astype(np.int32)),
        part=torch.from_numpy((place - low).astype(np.float32)),
        narrow=torch.tensor(narrow, dtype=torch.int64),
        level=torch.from_numpy(np.array([row.move.level for row in rows])),
        roomy=torch.tensor([*rooms], dtype=torch.int64),
        rooms=torch.tensor([*rooms.values()], dtype=torch.float32).view(len(rooms), 2),
        noisy=torch.tensor([*noises], dtype=torch.int64),
        noise=torch.from_numpy(np.array(noise, dtype=np.int32).reshape(-1, frames)),
        quieter=torch.tensor([quieter for _, quieter in noises.values()], dtype=torch.float32),
        banded=torch.tensor([*bands], dtype=torch.int64),
        bands=torch.tensor([*bands.values()], dtype=torch.int64).view(len(bands), 2, 2),
    )


def frames_of(kept: Tensor, told: Recipe, chunk_frames: int) -> Tensor:
    """kept float16 [frames, C], log10 of mel power -> the model's frames float32 [B T/F, F, C], on the device
    on which both lie.
    """
    x = warp(kept.index_select(0, told.source).float(), told.warps, told.voice)
    x = stretch(x, told.place, told.part)
    x.index_copy_(0, told.narrow, narrowed(x[told.narrow]))
    x.index_copy_(0, told.roomy, ring_on(x[told.roomy], *told.rooms.T))
    x += told.level[:, None]
    noise = kept.index_select(0, told.noise.flatten()).float().view(-1, *x.shape[1:])
    x.index_copy_(0, told.noisy, mix(x[told.noisy], noise, told.quieter))
    x.index_copy_(0, told.banded, blank(x[told.banded], told.bands))
    return clamp(x.clamp_(min=FLOOR).unflatten(1, (-1, chunk_frames))).flatten(0, 1)


def warp(x: Tensor, warps: Tensor, voice: Tensor) -> Tensor:
    """x [J, C] -> the same; bin c of a frame is what was at warps[voice, c], between bins."""
    low = warps.floor().clamp(max=MEL_BINS - 2)
    which = voice.long()
    bins, part = (table.index_select(0, which) for table in (low.long(), warps - low))
    return torch.lerp(x.gather(1, bins), x.gather(1, bins + 1), part)


def stretch(x: Tensor, place: Tensor, part: Tensor) -> Tensor:
    """x [J, C] -> [B, T, C]: between the frames `place` and `place` + 1, both [B, T]."""
    low = place.flatten()
    high = (low + 1).clamp(max=len(x) - 1)  # where that is another row's, part is 0
    between = torch.lerp(x.index_select(0, low), x.index_select(0, high), part.flatten()[:, None])
    return between.unflatten(0, place.shape)


def narrowed(x: Tensor) -> Tensor:
    """x [N, T, C] through a telephone; its bins lie in order, so that no mask has to go to a GPU."""
    through = int(np.searchsorted(centres_hz(), NARROW_HZ, side="right"))
    return F.pad(x[..., :through], (0, x.shape[-1] - through), value=FLOOR)


def ring_on(x: Tensor, decay: Tensor, ring: Tensor) -> Tensor:
    """x [R, T, C] in rooms, decay and ring float32 [R]."""
    decay, ring = decay[:, None, None], ring[:, None, None]
    power = torch.exp(x * LN10)
    tail = power  # the sum of decay^k times the power k frames before, for k < reach
    reach = 1
    while reach < min(REACH, x.shape[1]):
        later = tail[:, reach:] + decay**reach * tail[:, :-reach]
        tail, reach = torch.cat((tail[:, :reach], later), dim=1), 2 * reach
    power = power + (tail - power) * (ring * (1 - decay) / decay)
    return power.clamp(min=10**FLOOR).log10()


def mix(x: Tensor, noise: Tensor, quieter: Tensor) -> Tensor:
    """The sum of powers of x and noise [M, T, C], which is moved so far that its loudest frame lies `quieter`
    [M] (log10 of power) below that of x.
    """
    level = x.mean(dim=-1).amax(dim=-1) - noise.mean(dim=-1).amax(dim=-1) - quieter
    return torch.logaddexp(x * LN10, (noise + level[:, None, None]) * LN10) / LN10


def blank(x: Tensor, bands: Tensor) -> Tensor:
    """x [K, T, C] with each row's mean in the bins first..end of its two bands, int64 [K, 2, 2]."""
    bins = torch.arange(x.shape[-1], device=x.device)
    inside = ((bins >= bands[..., :1]) & (bins < bands[..., 1:])).any(dim=1)  # [K, C]
    return torch.where(inside[:, None], x.mean(dim=(1, 2), keepdim=True), x)
