"""Log-mel of whole streams, as the listening loop sees it chunk by chunk; computed once, kept on disk.

`fastloop.mel` is the runtime; this computes all chunks of a finished stream at once and leaves the clamp
to `clamp`, so that kept streams can be amplified, mixed and joined before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES, MEL_BINS
from ..files import CheckpointError, new_directory
from ..ops.mel import mel_filters
from .ahead import made
from .shards import Report, Stream, Turn, also, nothing_usable, read_streams

FRAMES, INDEX = "frames.f16", "index.json"


def raw_log_mel(pcm: Tensor, chunk_samples: int) -> Tensor:
    """pcm float32 [S], whole chunks -> log10 mel power [chunks, F, C], every chunk edge reflected."""
    chunks = pcm.view(-1, chunk_samples)
    half, tail = FFT_SAMPLES // 2, FFT_SAMPLES // 2 - HOP_SAMPLES
    before = torch.cat((pcm[1 : half + 1].flip(0)[None], chunks[:-1, -half:]))
    after = chunks[:, -tail - 1 : -1].flip(1)
    windows = torch.cat((before, chunks, after), dim=1).unfold(1, FFT_SAMPLES, HOP_SAMPLES)
    spectrum = torch.fft.rfft(windows * torch.hann_window(FFT_SAMPLES))
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ mel_filters()[0].T).clamp(min=1e-10).log10()


def clamp(raw: Tensor) -> Tensor:
    """log10 power [..., chunks, F, C] -> the model's frames: clamp 8 below the running maximum, scale."""
    loudest = raw.amax(dim=(-2, -1), keepdim=True).cummax(dim=-3).values
    return (torch.maximum(raw, loudest - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class FeatureSet:
    """Streams and their features: stream i has the chunks places[i] = (first, end) of `frames`, a mapped
    float16 [chunks, F, C] of log10 mel power.
    """

    streams: tuple[Stream, ...]
    places: tuple[tuple[int, int], ...]
    frames: np.ndarray

    def chunks(self, index: int) -> int:
        """The length of a stream."""
        first, end = self.places[index]
        return end - first

    @property
    def kept(self) -> Tensor:
        """All frames, float16 [frames, C], mapped; not to be written to."""
        return torch.from_numpy(self.frames).flatten(0, 1)

    def only(self, abilities: Sequence[str]) -> FeatureSet:
        """The streams of these abilities."""
        kept = [i for i, stream in enumerate(self.streams) if stream.ability in abilities]
        return FeatureSet(
            tuple(self.streams[i] for i in kept), tuple(self.places[i] for i in kept), self.frames
        )


def feature_set(
    shards: Sequence[Path], split: str, chunk_frames: int, cache: Path, skipped: Report, workers: int = 0
) -> FeatureSet:
    """The features of a split of the shards, from the directory `cache`, where they are put first, by
    `workers` processes, if they are not there yet. Another set of shards goes into another subdirectory.
    """
    stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    kept = [field.name for kind in (Stream, Turn) for field in dataclasses.fields(kind)]
    key = hashlib.sha256(json.dumps([stamp, split, chunk_frames, kept]).encode()).hexdigest()[:12]
    directory = cache / f"{split}-{key}"
    if not directory.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        size = 2 * sum(path.stat().st_size for path in shards)
        try:
            with new_directory(directory, size) as partial:
                _write(partial, shards, split, chunk_frames, skipped, workers)
        except CheckpointError:
            if not directory.is_dir():  # else another process has made the same meanwhile
                raise
    return _open(directory, chunk_frames)


@dataclass
class _Shard:
    """What one shard holds, all in memory: streams, float16 features of each, why others were left out."""

    streams: list[Stream]
    raw: list[Tensor]
    reasons: list[str]


def _shard(path: Path, split: str, chunk_frames: int) -> _Shard:
    found, chunk_samples = _Shard([], [], []), chunk_frames * HOP_SAMPLES
    for stream, pcm in read_streams([path], split, found.reasons.append):
        whole = F.pad(torch.from_numpy(pcm), (0, -len(pcm) % chunk_samples))
        found.streams.append(stream)
        found.raw.append(raw_log_mel(whole, chunk_samples).half())
    return found


def _write(
    directory: Path, shards: Sequence[Path], split: str, chunk_frames: int, skipped: Report, workers: int
) -> None:
    def make(number: int) -> _Shard:
        return _shard(shards[number], split, chunk_frames)

    first, streams, reasons = [0], list[dict[str, Any]](), list[str]()
    tell = also(reasons, skipped)
    with (directory / FRAMES).open("wb") as file:
        for shard in made(make, range(len(shards)), workers, ahead=1):
            for reason in shard.reasons:
                tell(reason)
            for stream, raw in zip(shard.streams, shard.raw, strict=True):
                file.write(raw.numpy().tobytes())
                first.append(first[-1] + len(raw))
                streams.append(dataclasses.asdict(stream))
    if not streams:
        raise nothing_usable(split, shards, reasons)
    (directory / INDEX).write_text(json.dumps({"first": first, "streams": streams}), encoding="utf-8")


def _open(directory: Path, chunk_frames: int) -> FeatureSet:
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    streams = tuple(
        Stream(**{**values, "turns": tuple(Turn(**turn) for turn in values["turns"])})
        for values in index["streams"]
    )
    shape = (index["first"][-1], chunk_frames, MEL_BINS)
    # torch knows no arrays that are only read: whoever wrote would write into a copy.
    frames = np.memmap(directory / FRAMES, dtype=np.float16, mode="c", shape=shape)
    places = tuple(zip(index["first"], index["first"][1:], strict=False))
    return FeatureSet(streams, places, frames)
