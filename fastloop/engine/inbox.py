"""The input queue of one session: pushes of any size and rate in, whole chunks out, bounded in seconds."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from ..audio import Resampler, to_mono_float32
from ..config import SAMPLE_RATE, ConfigError
from ..errors import QueueFullError

LOOKAHEAD_SAMPLES = 40  # what the last frame of a chunk reaches into the future: 2.5 ms


class Inbox:
    """Samples waiting to become chunks. `push` and `flush` come from any thread, `take` from the engine.

    chunk_samples: samples of one chunk.
    lead_samples: samples to arrive before the first chunk is counted (edge="wait": the lookahead).
    clock: monotonic seconds.
    """

    def __init__(
        self,
        chunk_samples: int,
        lead_samples: int,
        max_queued_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.chunk_samples = chunk_samples
        self.lead_samples = lead_samples
        self.max_queued_s = max_queued_s
        self.clock = clock
        self.lock = threading.Lock()
        self.blocks: deque[np.ndarray] = deque()  # float32 at 16 kHz
        self.waiting = 0  # samples in `blocks`
        self.received = 0  # samples ever received, padding included
        self.flushed = 0  # `received` after the last flush
        self.resampler: Resampler | None = None
        # (received after a push, monotonic seconds), of those pushes that completed a chunk
        self._arrivals: deque[tuple[int, float]] = deque()

    def push(self, pcm: object, sample_rate: int, backlog_s: float) -> float:
        """Append audio; returns the seconds queued, `backlog_s` (chunks not yet decided) included.

        QueueFullError, ValueError and TypeError take nothing.
        """
        samples = to_mono_float32(pcm, where="Session.push: pcm")
        with self.lock:
            resampler = self._resampler_for(sample_rate)
            queued = self.waiting / SAMPLE_RATE + backlog_s
            seconds = len(samples) / resampler.rate
            if queued + seconds > self.max_queued_s + 1e-9:
                raise QueueFullError(
                    f"Session.push: {seconds:.2f} s on top of {queued:.2f} s queued is more than "
                    f"max_queued_s={self.max_queued_s:g}; nothing was taken. Push again later."
                )
            self.resampler = resampler
            self._append(resampler.push(samples))
            return self.waiting / SAMPLE_RATE + backlog_s

    def finish(self) -> bool:
        """The clip has ended: take what the resampler holds back. False where no sound came at all."""
        with self.lock:
            self._drain_resampler()
            return self.received > 0

    def flush(self) -> None:
        """Complete a partial chunk with zeros so that the sound so far is decided. Nothing new: nothing.

        With a lead, the last 2.5 ms of sound may have served as lookahead only.
        """
        with self.lock:
            self._drain_resampler()
            if self.received > self.flushed:
                chunks = max(1, -(-(self.received - self.lead_samples) // self.chunk_samples))
                missing = chunks * self.chunk_samples + self.lead_samples - self.received
                self._append(np.zeros(missing, dtype=np.float32))
                self.flushed = self.received

    def due(self, count: int) -> float | None:
        """The moment the first `count` samples waiting were complete (monotonic seconds), or None."""
        with self.lock:
            if self.waiting < count:
                return None
            end = self.received - self.waiting + count
            for received, arrived in self._arrivals:
                if received >= end:
                    return arrived
            raise AssertionError("what waits has arrived")

    def take(self, count: int) -> tuple[np.ndarray, float] | None:
        """`count` samples and the moment the last of them arrived (monotonic seconds), or None."""
        with self.lock:
            if self.waiting < count:
                return None
            end = self.received - self.waiting + count
            while self._arrivals[0][0] < end:
                self._arrivals.popleft()
            return self._pop(count), self._arrivals[0][1]

    def take_all(self) -> np.ndarray:
        with self.lock:
            self._arrivals.clear()
            return self._pop(self.waiting)

    def export(self) -> tuple[np.ndarray, dict[str, Any]]:
        """A copy of the samples waiting, and plain data, for snapshots; nothing is pushed in between."""
        with self.lock:
            samples = np.concatenate([*self.blocks, np.empty(0, dtype=np.float32)])
            resampler = self.resampler.export() if self.resampler else None
            return samples, {"received": self.received, "flushed": self.flushed, "resampler": resampler}

    def restore(self, samples: np.ndarray, values: dict[str, Any]) -> None:
        """Fill an empty inbox with what `export` gave."""
        with self.lock:
            self.received = values["received"] - len(samples)
            self._append(samples)
            self.flushed = values["flushed"]
            if values["resampler"] is not None:
                self.resampler = Resampler.restore(values["resampler"])

    def _resampler_for(self, sample_rate: int) -> Resampler:
        current = self.resampler
        if current is None or (current.rate != sample_rate and not current.busy):
            return Resampler(sample_rate)
        if current.rate != sample_rate:
            raise ConfigError(
                f"Session.push: sample_rate {sample_rate!r} after {current.rate}; call flush() before "
                "changing the rate of a stream"
            )
        return current

    def _drain_resampler(self) -> None:
        if self.resampler is not None:
            self._append(self.resampler.flush())

    def _append(self, samples: np.ndarray) -> None:
        """Pushes of single samples are joined: what waits costs memory by the second, not by the push."""
        if not len(samples):
            return
        if self.blocks and len(self.blocks[-1]) + len(samples) <= self.chunk_samples:
            samples_here = np.concatenate((self.blocks.pop(), samples))
        else:
            samples_here = samples
        self.blocks.append(samples_here)
        before = self._chunks_received
        self.waiting += len(samples)
        self.received += len(samples)
        if self._chunks_received > before:
            self._arrivals.append((self.received, self.clock()))

    @property
    def _chunks_received(self) -> int:
        """Whole chunks that have come; -1 before the lead is complete."""
        return (self.received - self.lead_samples) // self.chunk_samples

    def _pop(self, count: int) -> np.ndarray:
        parts, missing = [], count
        while missing:
            block = self.blocks.popleft()
            if len(block) > missing:
                self.blocks.appendleft(block[missing:])
                block = block[:missing]
            parts.append(block)
            missing -= len(block)
        self.waiting -= count
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype=np.float32)])
