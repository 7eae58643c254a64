"""Sound files: wav, flac, ogg (Vorbis, Opus) and mp3, decoded block by block, mono, at 16 kHz.

What a damaged file still holds is delivered; then the error says at which second it broke.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import soundfile

from ..config import SAMPLE_RATE
from .containers import CONVERT, WavLayout, Window, check_shape, identify, ogg_problem, wav_layout
from .pcm import AudioError, complaint, first_bad, mix, to_mono_float32
from .resample import Resampler, check_rate

MAX_SECONDS = 12 * 3600.0
SUBTYPES = {
    "FLAC": ("PCM_S8", "PCM_16", "PCM_24"),
    "OGG": ("VORBIS", "OPUS"),
    "MP3": ("MPEG_LAYER_III", "MPEG_LAYER_II"),
}
PIECE_FRAMES = 1024  # decoded at a time: of the piece that fails, even the good part can be lost
_UNKNOWN_FRAMES = 1 << 62  # libsndfile's "no idea" is near 2^63


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """Read without seeking: soundfile seeks behind every read where it can, which changes mp3's last bits."""

    def seekable(self) -> bool:
        return False


class AudioFile:
    """An open sound file; iterate it, once, for blocks of float32 mono [S] at 16 kHz, at most about 1 s each.

    Args:
        path: wav, flac, ogg or mp3; the content counts, not the name.
        max_seconds: of *decoded* sound; a small file can hold a great deal of it.

    Attributes:
        format: "WAV", "FLAC", "OGG" or "MP3".  codec: libsndfile's name of how the samples are stored.
        sample_rate, channels: of the file.
        seconds: length as the header has it, or None where it does not know.
        position_s: seconds decoded so far.

    AudioError where there is no such file, where it is not sound, damaged beyond its header, of a kind that
    is not read, or longer than max_seconds; while iterating, after all that could be decoded, where it is
    damaged. Of an mp3 that has no Xing or Info header nobody can say that its end is missing.
    """

    def __init__(self, path: str | os.PathLike[str], max_seconds: float = MAX_SECONDS) -> None:
        if not max_seconds > 0:
            raise ValueError(f"open_audio: max_seconds must be positive, got {max_seconds!r}")
        self.path = os.fspath(path)
        self.max_seconds = max_seconds
        self._decoded = 0  # frames
        self._begun = False
        with contextlib.ExitStack() as opened:
            self._sound = self._open(opened)
            self.codec: str = self._sound.subtype
            self.sample_rate: int = self._sound.samplerate
            self.channels: int = self._sound.channels
            self.seconds = None if self._expected is None else self._expected / self.sample_rate
            self._check()
            self._opened = opened.pop_all()

    def _open(self, opened: contextlib.ExitStack) -> _Forward:
        """The decoder; sets what the headers say: format, _expected (frames) and _problem (at the end)."""
        raw = opened.enter_context(_open_file(self.path))
        self.format = identify(raw, self.path)
        self._expected: int | None
        self._problem: str | None = None
        if self.format == "WAV":
            layout = wav_layout(raw, self.path)
            self._expected, self._problem = layout.declared, layout.problem
            return opened.enter_context(_open_wav(raw, layout))
        if self.format == "OGG":
            self._problem = ogg_problem(raw)
        sound = opened.enter_context(_open_compressed(raw, self.format, self.path))
        self._expected = sound.frames if 0 <= sound.frames < _UNKNOWN_FRAMES else None
        return sound

    def _check(self) -> None:
        """AudioError where the headers promise what is not read."""
        if self.format != "WAV" and (
            self._sound.format != self.format or self.codec not in SUBTYPES[self.format]
        ):
            raise AudioError(
                f"{self.path}: holds {self.codec} in {self._sound.format}; of {self.format} files "
                f"{SUBTYPES[self.format]} are read; {CONVERT}"
            )
        check_shape(self.sample_rate, self.channels, self.path)
        if self._expected == 0 or self._sound.frames == 0:
            why = f": {self._problem}" if self._problem else ""
            raise AudioError(f"{self.path}: holds no sound (0 samples){why}")
        if self.seconds is not None and self.seconds > self.max_seconds:
            raise AudioError(
                f"{self.path}: holds {self.seconds:.0f} s of sound, the limit is {self.max_seconds:g} s; cut "
                "it, or raise max_seconds"
            )

    @property
    def position_s(self) -> float:
        return self._decoded / self.sample_rate

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._begun:
            raise AudioError(f"{self.path}: is read once only; open it again")
        self._begun = True
        return self._blocks()

    def _blocks(self) -> Iterator[np.ndarray]:
        resampler = Resampler(self.sample_rate)
        frames = max(1, self.sample_rate * 9 // 10)  # with what the resampler held back: less than 1 s
        buffer = np.empty((frames, self.channels), dtype=np.float32)
        problem: str | None = None
        while problem is None:
            count, problem = self._fill(buffer)
            if count == 0 and problem is None:
                break
            self._decoded += count
            out = resampler.push(mix(buffer[:count].T))
            if len(out):
                yield out
        if len(rest := resampler.flush()):
            yield rest
        problem = problem or self._problem or self._shortfall()
        if problem:
            of = "" if self.seconds is None else f" of {self.seconds:.2f} s"
            raise AudioError(
                f"{self.path}: breaks off at {self.position_s:.2f} s{of}: {problem}; the sound up to there "
                "was delivered"
            )

    def _fill(self, buffer: np.ndarray) -> tuple[int, str | None]:
        """Decode into buffer [frames, channels]: (good frames, what is wrong behind them or None)."""
        count, problem = 0, None
        try:
            while count < len(buffer):
                piece = self._sound.read(out=buffer[count : count + PIECE_FRAMES])
                count += len(piece)
                if len(piece) == 0:
                    break
        except soundfile.LibsndfileError as error:
            good = (
                self._sound.tell() - self._decoded
            )  # with the good part of the piece, where the decoder says
            count = min(max(count, good), len(buffer))
            problem = f"cannot be decoded ({error.error_string.strip() or f'libsndfile error {error.code}'})"
        limit = int(self.max_seconds * self.sample_rate) - self._decoded
        if count > limit:
            problem = f"holds more sound than the limit of {self.max_seconds:g} s; raise max_seconds"
            count = limit
        bad = first_bad(buffer[:count])
        if bad is not None:
            count, problem = bad[0], f"the next sample {complaint(buffer[bad])}"
        return count, problem

    def _shortfall(self) -> str | None:
        if self._expected is None or self._decoded >= self._expected:
            return None
        return "it is truncated or damaged, fewer samples could be decoded than its header promises"

    def close(self) -> None:
        """Idempotent."""
        self._opened.close()

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_audio(path: str | os.PathLike[str], max_seconds: float = MAX_SECONDS) -> AudioFile:
    """Open a sound file; see AudioFile. To be used as a context manager."""
    return AudioFile(path, max_seconds)


def read(path: str | os.PathLike[str], max_seconds: float = MAX_SECONDS) -> Iterator[np.ndarray]:
    """Blocks of float32 mono [S] at 16 kHz, at most about 1 s; the file is opened and checked at once."""
    return _read(AudioFile(path, max_seconds))


def _read(file: AudioFile) -> Iterator[np.ndarray]:
    with file:
        yield from file


def write_wav(path: str | os.PathLike[str], pcm: object, sample_rate: int = SAMPLE_RATE) -> None:
    """Write mono 16-bit WAV; pcm as `to_mono_float32` takes it, what lies beyond full scale is clipped."""
    samples = to_mono_float32(pcm, where="write_wav: pcm")
    soundfile.write(os.fspath(path), samples, check_rate(sample_rate), format="WAV", subtype="PCM_16")


def _open_file(path: str) -> BinaryIO:
    """A regular file, open for reading without a buffer (libsndfile shares the position)."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{path}: is a directory; name the sound files in it")
        if not stat.S_ISREG(mode):
            raise AudioError(f"{path}: is not a regular file; pipe raw PCM to standard input instead")
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file; paths are relative to {Path.cwd()}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{path}: cannot be opened: {error}") from error


def _open_wav(raw: BinaryIO, layout: WavLayout) -> _Forward:
    """The bare samples through libsndfile's headerless reader: its WAV parser never sees the file."""
    size = layout.frames * layout.frame_bytes
    return _Forward(
        Window(raw, layout.start, size),
        samplerate=layout.sample_rate,
        channels=layout.channels,
        format="RAW",
        subtype=layout.codec,
        endian="LITTLE",
    )


def _open_compressed(raw: BinaryIO, kind: str, path: str) -> _Forward:
    """FLAC, Ogg or MP3 by file descriptor, so that the name cannot choose the decoder."""
    raw.seek(0)
    try:
        return _Forward(os.dup(raw.fileno()), closefd=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path}: is truncated or corrupt: its {kind} header cannot be decoded "
            f"({error.error_string.strip()}); get the file again"
        ) from error
