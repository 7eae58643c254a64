"""What `fastloop listen` was asked to hear: files, standard input or the microphone, opened in turn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..audio import Microphone, open_audio, read_pcm_stream
from .feeds import FastFeed, Feed, LiveFeed, PacedFeed
from .terminal import UsageProblem

FILE, STDIN, MIC = "file", "stdin", "mic"
CONTAINERS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"}


@dataclass(frozen=True)
class Source:
    """One stream to hear. name: as the caller knows it; path: of a file."""

    kind: str
    name: str
    path: Path | None = None


@dataclass(frozen=True)
class PcmFormat:
    """Raw PCM on standard input."""

    sample_rate: int
    sample_format: str
    channels: int


@contextlib.contextmanager
def opened(
    source: Source, pcm: PcmFormat, chunk_samples: int, realtime: bool
) -> Iterator[tuple[Feed, float | None]]:
    """The feed of a source and its length in seconds, where it is known. AudioError, UsageProblem."""
    if source.kind == MIC:
        with Microphone() as microphone:
            yield LiveFeed(microphone, chunk_samples), None
    elif source.kind == STDIN:
        yield LiveFeed(_pcm(pcm), chunk_samples), None
    else:
        assert source.path is not None
        with open_audio(source.path) as file:
            yield PacedFeed(file) if realtime else FastFeed(file, chunk_samples), file.seconds


class RawPcm:
    """A pipe that must not begin like a sound file: its header, rate and channels would be heard as noise."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._begun = False

    def read(self, size: int, /) -> bytes | None:
        data = self._pipe.read(size)
        if data and not self._begun:
            self._begun = True
            kind = next((kind for magic, kind in CONTAINERS.items() if data.startswith(magic)), None)
            if kind is not None:
                raise UsageProblem(f"standard input is a {kind} file, not raw PCM; give its name as FILE")
        return data


def _pcm(pcm: PcmFormat) -> Iterator[np.ndarray]:
    try:
        return read_pcm_stream(RawPcm(standard_input()), pcm.sample_rate, pcm.sample_format, pcm.channels)
    except ValueError as error:
        raise UsageProblem(f"standard input: {error}") from error


def standard_input() -> BinaryIO:
    """Standard input without Python's buffer, whose lock a waiting reader holds while the program ends."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageProblem("- reads raw PCM from a pipe, but standard input is a terminal or closed")
    buffer: BinaryIO = sys.stdin.buffer
    return getattr(buffer, "raw", buffer)
