"""Streams out: webdataset tars with the record of each stream, and what a model reads of a record.

A shard holds, per stream, `<id>.flac` (16 kHz mono, 16 bit) and `<id>.json`, the record: the public
structure of StreamAudio-2M (id, stream_scene_type, num_turns, turns with user, assistant, emotion,
scene_type, audio_path; arXiv 2606.05121) plus ability, sub_task, split, seed, duration_s, and for each
turn label, start_s, end_s, answer_s: stream times in seconds. Turns are in the order of their start;
answer_s is the time from which the answer is due, null for silence. shards.py reads them.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile

from ..config import SAMPLE_RATE, ModelConfig
from ..text import Tokenizer
from .compose import Composed, Record
from .sequence import TokenSequence, build, due_replies, plan
from .shards import parse_stream


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and mode are fixed: equal contents, equal bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def encode_flac(pcm: np.ndarray) -> bytes:
    """float32 [S] within [-1, 1) -> 16-bit FLAC at 16 kHz."""
    buffer = io.BytesIO()
    whole = np.clip(np.round(pcm * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(buffer, whole, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def write_shard(path: Path, streams: Iterable[Composed]) -> int:
    """Write a tar that is whole or absent -> number of streams; the same streams give the same bytes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for made in streams:
                    name = made.record["id"]
                    _member(tar, f"{name}.flac", encode_flac(made.pcm))
                    parse_stream(made.record)  # nothing is written that cannot be read
                    text = json.dumps(made.record, ensure_ascii=False, allow_nan=False)
                    _member(tar, f"{name}.json", text.encode())
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def token_sequence(
    config: ModelConfig,
    tokenizer: Tokenizer,
    record: Record,
    system_prompt: str | None = None,
    rng: np.random.Generator | None = None,
) -> TokenSequence:
    """A record -> ids and labels of its stream, whole chunks (the last one filled up with silence).

    rng: some histories answer too soon or too late, as `sequence.plan` has it.
    """
    stream, chunk_s = parse_stream(record), config.chunk_seconds
    chunks = math.ceil(stream.seconds / chunk_s - 1e-9)
    return build(
        config, tokenizer, plan(due_replies(stream.turns, chunks, chunk_s), chunks, rng), system_prompt
    )
