"""Streams whose truth is known, to evaluate on: shards, or JSON lines beside sound files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..audio import AudioError
from .benchmark_files import rows, samples
from .shards import (
    Report,
    ShardError,
    Stream,
    also,
    check_length,
    find_shards,
    nothing_usable,
    parse_stream,
    read_streams,
)

Pair = tuple[Stream, np.ndarray]


def read_truth(paths: Sequence[Path], split: str | None, skipped: Report, limit: int = 0) -> list[Pair]:
    """Streams with their sound, float32 [S]; `split` None: of all splits; limit 0: no limit. `skipped` is
    told what is left out and why; ShardError where nothing is left, BenchmarkError where lines are no JSON.
    """
    pairs: list[Pair] = []
    reasons: list[str] = []
    tell = also(reasons, skipped)
    for path in paths:
        lines = path.suffix in (".json", ".jsonl")
        found = _read_lines(path, split, tell) if lines else read_streams(find_shards([path]), split, tell)
        for pair in found:
            pairs.append(pair)
            if limit and len(pairs) >= limit:
                return pairs
    if not pairs:
        raise nothing_usable(split, paths, reasons)
    return pairs


def _read_lines(manifest: Path, split: str | None, skipped: Report) -> Iterator[Pair]:
    """A JSON list or JSON lines; `audio_path` is relative to the manifest."""
    for where, values in rows(manifest):
        try:
            stream = parse_stream(values)
            if split in (None, stream.split):
                pcm = samples(manifest.parent / str(values.get("audio_path")))
                check_length(stream, pcm)
                yield stream, pcm
        except (ShardError, AudioError) as error:
            skipped(f"{where}: {error}")
