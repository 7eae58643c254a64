"""Any rate -> 16 kHz, push by push: what comes out does not depend on how the sound was cut.

The filter is soxr's (quality "HQ"). It works in blocks: what it holds back grows to `delay_s` and falls
again. A soxr stream cannot be saved, but it can be rebuilt. Its output repeats on a grid of input samples on
which both the blocks and the ratio of the rates fall into phase; a fresh stream fed from a grid point gives
the same bits as the old one once its filter is filled. So the inputs since a recent grid point are the whole
state.
"""

from __future__ import annotations

import base64
import functools
import math
import operator
from typing import Any

import numpy as np

from ..config import SAMPLE_RATE
from ..errors import SnapshotError

MIN_RATE, MAX_RATE = 1_000, 768_000
MAX_HISTORY_SAMPLES = 1_500_000  # 6 MB; above it a stream is not exported
SETTLE_BLOCKS = 3  # a rebuilt stream is exact after one `first` of input (measured 0.83 to 0.92 of it)
CHECKED_SAMPLES = 512  # outputs compared when a stream is rebuilt
PROBED_BLOCKS = 12

_NOTHING = np.empty(0, dtype=np.float32)


def check_rate(rate: object) -> int:
    """The rate as an int; ValueError where it is not a whole number of Hz from 1,000 to 768,000."""
    try:
        if isinstance(rate, bool | np.bool_):
            raise TypeError
        value = operator.index(rate)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"sample rate: must be a whole number of Hz, an int, got {rate!r}") from None
    if not MIN_RATE <= value <= MAX_RATE:
        raise ValueError(f"sample rate: {value} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")
    return value


class Resampler:
    """A stream of sound at `rate` Hz -> the same at 16 kHz. At 16 kHz nothing is changed or held back.

    Raises:
        ValueError: rate is not an int from 1,000 to 768,000.
    """

    def __init__(self, rate: int) -> None:
        self.rate = check_rate(rate)
        self._stream = None if self.rate == SAMPLE_RATE else _new_stream(self.rate)
        self._begin()

    def _begin(self) -> None:
        self.received = 0  # samples at `rate` since the last flush
        self.emitted = 0  # samples at 16 kHz since the last flush
        self._start = 0  # the input sample that `_history` begins with, a grid point
        self._history = bytearray()  # float32 input samples, enough to rebuild the stream
        self._last = _NOTHING  # the newest outputs, up to CHECKED_SAMPLES

    @property
    def busy(self) -> bool:
        """Sound came in that `flush` has not ended; the stream cannot change its rate now."""
        return self._stream is not None and self.received > 0

    @property
    def delay_s(self) -> float:
        """Seconds that a sample can be held back at most: half the filter and one block."""
        return 0.0 if self._stream is None else _blocks(self.rate)[0] / self.rate

    def push(self, samples: np.ndarray) -> np.ndarray:
        """float32 [S] at `rate` -> float32 [.] at 16 kHz, all that is ready, often nothing.

        The samples must be finite, as `to_mono_float32` gives them: NaN would stay in the filter for good.
        TypeError where they are not a float32 array of one dimension.
        """
        if not isinstance(samples, np.ndarray) or samples.dtype != np.float32 or samples.ndim != 1:
            raise TypeError(
                "Resampler.push: needs a float32 array [S]; to_mono_float32 makes one of any other"
            )
        if self._stream is None:
            return samples
        if not len(samples):
            return _NOTHING
        samples = np.ascontiguousarray(samples)
        size = _blocks(self.rate)[0] // 2  # at most one block a call: of more, soxr may hold some back
        pieces = [samples[i : i + size] for i in range(0, len(samples), size)]
        out = np.concatenate([self._stream.resample_chunk(piece) for piece in pieces])
        self.received += len(samples)
        self.emitted += len(out)
        self._last = np.concatenate([self._last, out[-CHECKED_SAMPLES:]])[-CHECKED_SAMPLES:]
        self._remember(samples)
        return out

    def flush(self) -> np.ndarray:
        """The sound has ended: the rest, float32 [.] at 16 kHz. The next push begins a new stream."""
        if self._stream is None or not self.received:
            return _NOTHING
        out: np.ndarray = self._stream.resample_chunk(_NOTHING, last=True)
        self._stream.clear()
        self._begin()
        return out

    def export(self) -> dict[str, Any]:
        """The state as plain data (JSON), from which `restore` goes on to the bit; nothing is changed here.

        SnapshotError where the rate is one whose grid is too long to remember or does not hold to the bit.
        All common rates from 6,000 to 192,000 Hz can be saved.
        """
        if self.busy and not _repeats(self.rate):
            raise SnapshotError(
                f"Resampler.export: a {self.rate} Hz stream cannot be saved in the middle of a sound; "
                f"flush() it first, or resample to {SAMPLE_RATE} Hz before pushing"
            )
        values = {
            "rate": self.rate,
            "samples": base64.b64encode(self._history).decode("ascii"),
            "emitted": self.emitted - self._start * SAMPLE_RATE // self.rate,
            "last": base64.b64encode(self._last.tobytes()).decode("ascii"),
        }
        if self.busy:
            Resampler.restore(values)  # raises where the rebuilt stream would not go on as this one
        return values

    @classmethod
    def restore(cls, values: dict[str, Any]) -> Resampler:
        """The stream that `export` saved. SnapshotError where the values are damaged or do not rebuild it."""
        try:
            resampler = cls(values["rate"])
            samples = _decode(values["samples"])
            last = _decode(values["last"])
            emitted = operator.index(values["emitted"])
        except (KeyError, TypeError, ValueError) as error:
            raise SnapshotError(
                f"Resampler.restore: not an exported state ({error}); take a new one"
            ) from error
        resampler.push(samples)
        if resampler.emitted != emitted or not np.array_equal(resampler._last, last):
            import soxr

            raise SnapshotError(
                f"Resampler.restore: the rebuilt {resampler.rate} Hz stream would not go on exactly (soxr "
                f"here is {soxr.__version__}; another version cannot take it over); flush() before saving"
            )
        return resampler

    def _remember(self, samples: np.ndarray) -> None:
        """Append the inputs; forget those before the newest grid point that still fills the filter."""
        first, grid = _blocks(self.rate)
        if grid is None:
            return
        self._history += samples.tobytes()
        start = (self.received - SETTLE_BLOCKS * first) // grid * grid
        if start > self._start:
            del self._history[: 4 * (start - self._start)]  # a bytearray forgets its front without moving
            self._start = start


def _new_stream(rate: int) -> Any:
    import soxr  # sound at 16 kHz does without it

    return soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")


def _decode(text: str) -> np.ndarray:
    """base64 of float32 samples -> array; ValueError where it is not, or where they are not finite."""
    samples = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.float32)
    if not np.isfinite(samples).all():
        raise ValueError("samples are not finite")
    return samples


@functools.lru_cache(maxsize=64)
def _blocks(rate: int) -> tuple[int, int | None]:
    """(inputs until the first output, grid in inputs or None where it is too long), measured on zeros.

    A block is known by when outputs come. Where the rates' ratio makes one block a fraction longer than
    another, the pattern of several blocks repeats.
    """
    times = _output_times(rate)
    period = rate // math.gcd(rate, SAMPLE_RATE)  # inputs after which outputs fall on the same phase
    for blocks in range(1, PROBED_BLOCKS // 2):
        spans = {b - a for a, b in zip(times, times[blocks:], strict=False)}
        if len(spans) == 1:
            grid = math.lcm(period, spans.pop())
            return times[0], grid if grid <= MAX_HISTORY_SAMPLES else None
    return times[0], None


@functools.lru_cache(maxsize=64)
def _repeats(rate: int) -> bool:
    """Does noise with the period of the grid come out with that period, to the bit? Measured once a rate."""
    first, grid = _blocks(rate)
    if grid is None:
        return False
    settle = -(-SETTLE_BLOCKS * first // grid) * grid
    noise = np.random.default_rng(0).uniform(-1, 1, grid).astype(np.float32)
    stream = Resampler(rate)
    out = [stream.push(noise) for _ in range(settle // grid + 4)]
    settled = np.concatenate(out)[settle * SAMPLE_RATE // rate :]
    length = grid * SAMPLE_RATE // rate
    return np.array_equal(settled[length:], settled[:-length])


def _output_times(rate: int) -> list[int]:
    """How many inputs had come when each of the first outputs came; a coarse pass, then single samples."""
    coarse = 256
    zeros = np.zeros(coarse, dtype=np.float32)
    rough: list[int] = []
    count, stream = 0, _new_stream(rate)
    while len(rough) < PROBED_BLOCKS:
        count += coarse
        if len(stream.resample_chunk(zeros)):
            rough.append(count - coarse)
    times: list[int] = []
    count, stream = 0, _new_stream(rate)
    for before in rough:
        stream.resample_chunk(np.zeros(before - count, dtype=np.float32))
        count = before
        while True:
            count += 1
            if len(stream.resample_chunk(zeros[:1])):
                times.append(count)
                break
    return times
