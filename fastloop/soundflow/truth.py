"""Streams whose truth is known, to evaluate on: shards, or JSON lines beside sound files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..audio import AudioError, read
from ..config import SAMPLE_RATE
from .shards import Report, ShardError, Stream, find_shards, parse_stream, read_streams

Pair = tuple[Stream, np.ndarray]
LENGTH_S = 0.05  # so much may the sound and its duration_s differ


def read_truth(paths: Sequence[Path], split: str | None, skipped: Report, limit: int = 0) -> list[Pair]:
    """Streams with their sound, float32 [S]; `split` None: of all splits; limit 0: no limit. `skipped` is
    told what is left out and why; ShardError where nothing is left.
    """
    pairs: list[Pair] = []
    for path in paths:
        lines = path.suffix in (".json", ".jsonl")
        found = (
            _read_lines(path, split, skipped) if lines else read_streams(find_shards([path]), split, skipped)
        )
        for pair in found:
            pairs.append(pair)
            if limit and len(pairs) >= limit:
                return pairs
    if not pairs:
        of = f" of split {split!r}" if split else ""
        raise ShardError(f"no usable stream{of} in {', '.join(map(str, paths))}")
    return pairs


def _read_lines(manifest: Path, split: str | None, skipped: Report) -> list[Pair]:
    """A JSON list or JSON lines; `audio_path` is relative to the manifest."""
    try:
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{manifest}: cannot be read: {error}") from error
    pairs = []
    for where, values in _objects(text, manifest):
        try:
            stream = parse_stream(values)
            if split in (None, stream.split):
                pairs.append((stream, _sound(manifest.parent / str(values.get("audio_path")), stream)))
        except (ShardError, AudioError) as error:
            skipped(f"{where}: {error}")
    return pairs


def _objects(text: str, manifest: Path) -> list[tuple[str, dict[str, object]]]:
    """(place, object) of each record; ShardError names the place that is not one."""
    try:
        if text.lstrip().startswith("["):
            rows = [(f"{manifest}[{i}]", row) for i, row in enumerate(json.loads(text))]
        else:
            lines = enumerate(text.splitlines(), start=1)
            rows = [(f"{manifest}:{n}", json.loads(line)) for n, line in lines if line.strip()]
    except ValueError as error:
        raise ShardError(f"{manifest}: not valid JSON: {error}") from error
    for where, row in rows:
        if not isinstance(row, dict):
            raise ShardError(f"{where}: must be a JSON object, is a {type(row).__name__}")
    return rows


def _sound(path: Path, stream: Stream) -> np.ndarray:
    pcm = np.concatenate([*read(path)] or [np.zeros(0, np.float32)])
    if abs(len(pcm) / SAMPLE_RATE - stream.seconds) > LENGTH_S:
        raise ShardError(f"duration_s is {stream.seconds:g}, {path} lasts {len(pcm) / SAMPLE_RATE:g} s")
    return pcm
