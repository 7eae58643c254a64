"""mel: one chunk of 1 and of 64 streams, beside openai-whisper and transformers' extractor in the same run.

The rivals keep no state: they take one chunk for a whole clip, so their first frames come from a mirror where
ours come from what was before. The work is the same: 41 transforms a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import WhisperFeatureExtractor
from whisper.audio import log_mel_spectrogram

from fastloop.config import MEL_BINS
from fastloop.ops import mel, mel_ref
from fastloop.ops.mel import mel_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.mel_oracle import whisper_frames
from fastloop.testing.op_cases import mel_case
from fastloop.testing.timing import side_by_side

SAMPLES = 6400
ROUNDS = {1: 100, 64: 15}
every_count = pytest.mark.parametrize("streams", [1, 64])


@every_count
def test_mel(clock: Callable[..., None], implementation: Implementation, streams: int) -> None:
    case = mel_case(seeded(0), streams=streams, samples=SAMPLES)
    clock(implementation, case, mel_bytes(streams, SAMPLES))


@every_count
def test_mel_beside_rivals(benchmark: BenchmarkFixture, table: Callable[..., None], streams: int) -> None:
    """Each in turn, round after round; ratios of medians and of minima to ours."""
    case = mel_case(seeded(0), streams=streams, samples=SAMPLES)
    ours, defined = copied(case.arguments), copied(case.arguments)
    pcm = case.arguments["pcm"]
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS)
    clips = [row.numpy() for row in pcm]
    options = {"sampling_rate": 16_000, "return_tensors": "pt"}
    calls = {
        "fastloop": lambda: mel(**ours),
        "fastloop, the definition": lambda: mel_ref(**defined),
        "openai-whisper": lambda: log_mel_spectrogram(pcm, MEL_BINS),
        "transformers": lambda: extractor(clips, padding=False, **options),
    }
    frames = calls["fastloop"]()
    for clip, row in zip(pcm, frames, strict=True):
        interval = whisper_frames(clip)
        assert not interval.misses(row) and not interval.misses(log_mel_spectrogram(clip, MEL_BINS).T)
    with torch.inference_mode():
        timings = benchmark.pedantic(side_by_side, args=(calls, ROUNDS[streams]))
    table(f"mel, {streams} streams", timings)
