"""Sound as it happens: raw PCM from a pipe, and the microphone."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..config import SAMPLE_RATE
from .pcm import MAX_CHANNELS, AudioError, complaint, first_bad, mix
from .resample import Resampler, check_rate

SAMPLE_FORMATS: dict[str, np.dtype[Any]] = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
MICROPHONE_BLOCK_S = 0.02
MICROPHONE_QUEUE_S = 10.0  # what may wait for a slow reader

_log = logging.getLogger(__name__)


class BinaryStream(Protocol):
    """An open binary file; `read1`, where there is one, gives what has come instead of waiting for more."""

    def read(self, size: int, /) -> bytes | None: ...


def read_pcm_stream(
    file: BinaryStream, sample_rate: int, sample_format: str = "s16le", channels: int = 1
) -> Iterator[np.ndarray]:
    """Raw interleaved PCM -> blocks of float32 mono [S] at 16 kHz, each as soon as its bytes have come.

    Args:
        file: for example `sys.stdin.buffer`.
        sample_rate: Hz.
        sample_format: "s16le" (16-bit) or "f32le" (float32, full scale 1.0), little-endian.
        channels: interleaved; they are averaged.

    ValueError at once for a rate, format or number of channels that does not exist; AudioError while
    iterating, after all that is whole was delivered: no bytes at all, an end inside a sample, a sample that
    is no sound.
    """
    rate = check_rate(sample_rate)
    if sample_format not in SAMPLE_FORMATS:
        raise ValueError(f"sample format: {sample_format!r} is unknown; choose from {sorted(SAMPLE_FORMATS)}")
    if not isinstance(channels, int) or isinstance(channels, bool) or not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"channels: must be an int from 1 to {MAX_CHANNELS}, got {channels!r}")
    return _pcm_blocks(file, rate, sample_format, channels)


def _pcm_blocks(file: BinaryStream, rate: int, sample_format: str, channels: int) -> Iterator[np.ndarray]:
    dtype = SAMPLE_FORMATS[sample_format]
    frame_bytes = dtype.itemsize * channels
    receive = getattr(file, "read1", file.read)
    resampler = Resampler(rate)
    rest, frames = b"", 0
    problem: str | None = None
    while problem is None:
        data = receive(rate * frame_bytes)
        if data is None:
            raise AudioError("standard input: is non-blocking and has no data yet; pass a blocking stream")
        if not data:
            break
        rest += data
        whole = len(rest) // frame_bytes * frame_bytes
        block = np.frombuffer(rest[:whole], dtype=dtype).reshape(-1, channels)
        rest = rest[whole:]
        bad = first_bad(block)
        if bad is not None:
            problem = f"the next sample {complaint(block[bad])}; is it really {sample_format}?"
            block = block[: bad[0]]
        frames += len(block)
        out = resampler.push(mix(block.T))
        if len(out):
            yield out
    tail = resampler.flush()
    if len(tail):
        yield tail
    if problem is None and rest:
        form = f"{sample_format}, {channels} channels"
        problem = f"it ends inside a sample, {len(rest)} of {frame_bytes} bytes; is it really {form}?"
    if problem is None and not frames:
        problem = "no sound came; pipe raw PCM into it"
    if problem:
        raise AudioError(f"standard input: broke off at {frames / rate:.2f} s: {problem}")


class Microphone:
    """An input device, open for the length of a `with` block; iterate it for float32 mono [S] at 16 kHz.

    Args:
        sample_rate: Hz at which the device is opened; None: 16 kHz where the device can, else its own rate.
        device: number or part of the name, as `python -m sounddevice` lists them; None: the default input.

    Attributes:
        overruns: how often sound was lost, because the reader was too slow or the device said so; each is
        logged
            as a warning, too.
        lost_s: seconds known to be lost for want of a reader.

    AudioError where sounddevice or its PortAudio library is missing, and where the device cannot be opened.
    """

    def __init__(self, sample_rate: int | None = None, device: int | str | None = None) -> None:
        self._sounddevice = _import_sounddevice()
        self.device = device
        self.sample_rate = self._choose_rate() if sample_rate is None else check_rate(sample_rate)
        self.overruns = 0
        self.lost_s = 0.0
        self._blocks: queue.Queue[np.ndarray] = queue.Queue(int(MICROPHONE_QUEUE_S / MICROPHONE_BLOCK_S))
        self._stream: Any = None

    def _choose_rate(self) -> int:
        sounddevice = self._sounddevice
        try:
            info = sounddevice.query_devices(self.device, "input")
        except (ValueError, sounddevice.PortAudioError) as error:
            raise AudioError(
                f"microphone {self.device!r}: {error}; `python -m sounddevice` lists the devices"
            ) from error
        try:
            sounddevice.check_input_settings(
                device=self.device, channels=1, dtype="float32", samplerate=SAMPLE_RATE
            )
        except (ValueError, sounddevice.PortAudioError):
            return check_rate(round(info["default_samplerate"]))
        return SAMPLE_RATE

    def _receive(self, data: np.ndarray, frames: int, time: object, status: Any) -> None:
        """Called on PortAudio's thread with float32 [frames, 1]; must not wait."""
        if status.input_overflow:
            self.overruns += 1
            _log.warning("microphone: the device reports lost sound (overrun %d)", self.overruns)
        try:
            self._blocks.put_nowait(data[:, 0].copy())
        except queue.Full:
            self.overruns += 1
            self.lost_s += frames / self.sample_rate
            _log.warning(
                "microphone: %.0f s wait for the reader, %.2f s lost so far (overrun %d)",
                MICROPHONE_QUEUE_S,
                self.lost_s,
                self.overruns,
            )

    def __enter__(self) -> Microphone:
        sounddevice = self._sounddevice
        try:
            self._stream = sounddevice.InputStream(
                samplerate=self.sample_rate,
                device=self.device,
                channels=1,
                dtype="float32",
                blocksize=round(self.sample_rate * MICROPHONE_BLOCK_S),
                callback=self._receive,
            )
            self._stream.start()
        except (ValueError, sounddevice.PortAudioError) as error:
            raise AudioError(
                f"microphone {self.device!r}: cannot be opened at {self.sample_rate} Hz: {error}; `python -m "
                "sounddevice` lists the devices"
            ) from error
        return self

    def __iter__(self) -> Iterator[np.ndarray]:
        """Blocks as they come, until the `with` block is left or the device stops."""
        if self._stream is None:
            raise AudioError("microphone: is not open; use it in a `with` block")
        resampler = Resampler(self.sample_rate)
        while True:
            try:
                block = self._blocks.get(timeout=1.0)
            except queue.Empty:
                if self._stream is None:
                    return
                if not self._stream.active:
                    raise AudioError(f"microphone {self.device!r}: stopped; was it unplugged?") from None
                continue
            out = resampler.push(block)
            if len(out):
                yield out

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stream, self._stream = self._stream, None
        stream.close()


def _import_sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise AudioError("microphone: needs the package sounddevice; `pip install fastloop[mic]`") from error
    except OSError as error:  # the package is there, the system's library is not
        raise AudioError(
            f"microphone: {error}; install PortAudio, on Debian `apt-get install libportaudio2`"
        ) from error
    return sounddevice
