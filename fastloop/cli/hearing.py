"""One stream through a session, from its first sample to its summary: `fastloop listen` for one file."""

from __future__ import annotations

import time
from array import array
from collections import deque
from dataclasses import dataclass
from threading import Event as Flag
from typing import Any, Protocol

import numpy as np

from ..audio import AudioError
from ..config import SAMPLE_RATE
from ..engine import Engine
from ..engine.stats import percentile
from ..errors import FastloopError, QueueFullError
from ..events import Decision, Event, Failed, ResponseStart
from ..options import SessionConfig
from .feeds import Ended, Feed
from .terminal import UsageProblem


@dataclass(frozen=True)
class Summary:
    """What was heard of one stream. Latency: from the push of a chunk's last sample to its decision, ms;
    offline from the end of the clip to the start of the response; None where nothing was decided.
    """

    file: str
    audio_s: float
    wall_s: float
    chunks: int
    responses: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """The line of `--json`."""
        latency = {"p50": self.p50_ms, "p99": self.p99_ms, "max": self.max_ms}
        return {
            "type": "summary",
            "file": self.file,
            "audio_s": round(self.audio_s, 3),
            "wall_s": round(self.wall_s, 3),
            "chunks": self.chunks,
            "responses": self.responses,
            "latency_ms": {name: v if v is None else round(v, 3) for name, v in latency.items()},
        }


class Output(Protocol):
    """Where a stream's events go: JSON lines, plain lines or the live view."""

    def begin(self, name: str, seconds: float | None) -> None:
        """A stream starts; seconds: its length, where it is known."""

    def sound(self, block: np.ndarray) -> None:
        """A block, float32 [S], was pushed."""

    def event(self, event: Event) -> None:
        """The session said something."""

    def tick(self, queued_s: float, latency_ms: float | None) -> None:
        """Called all the time: seconds of sound waiting, latency of the last decision."""

    def end(self, summary: Summary) -> None:
        """The stream is over, for whatever reason."""


class Latency:
    """Pushes in, decisions in, percentiles out. Keeps 4 bytes a chunk: 36 KB an hour."""

    def __init__(self, chunk_samples: int) -> None:
        self.chunk_samples = chunk_samples
        self.seconds = array("f")
        self._pushed = 0  # samples
        self._pushes: deque[tuple[int, float]] = deque()  # (samples after a push, when it began)

    def push(self, samples: int, now: float) -> None:
        self._pushed += samples
        self._pushes.append((self._pushed, now))

    def decide(self, chunk: int, now: float) -> None:
        """Chunk number `chunk` was decided; a last chunk that lacks samples counts from the last push."""
        end = (chunk + 1) * self.chunk_samples
        while len(self._pushes) > 1 and self._pushes[0][0] < end:
            self._pushes.popleft()
        self.seconds.append(now - self._pushes[0][1])

    def answer(self, now: float) -> None:
        """The whole clip was answered (offline): counts from the last push."""
        self.seconds.append(now - self._pushes[-1][1])

    @property
    def last_ms(self) -> float | None:
        return self.seconds[-1] * 1000 if self.seconds else None

    def ms(self, q: float) -> float | None:
        """The q-th percentile (0..100) in milliseconds."""
        return percentile(self.seconds, q) * 1000 if self.seconds else None


def too_long(most_s: float) -> str:
    """Why a clip is refused."""
    return f"longer than {most_s:g} s, the most that --offline takes at once; leave it out to hear a stream"


class Hearing:
    """One session over one feed. `run` once; however it ends, the output gets a summary of what was heard."""

    def __init__(self, engine: Engine, config: SessionConfig, feed: Feed, output: Output, stop: Flag) -> None:
        self.engine, self.feed, self.output, self.stop = engine, feed, output, stop
        self.session = engine.open(config)
        self.latency = Latency(engine.model.config.chunk_samples)
        self.samples = self.chunks = self.responses = 0

    def run(self, name: str, seconds: float | None) -> Summary:
        """Feed and step until the sound ends or `stop` is set. AudioError where the sound broke off (what
        came before was heard), UsageProblem, FastloopError where the session failed.
        """
        begun = time.monotonic()
        self.output.begin(name, seconds)
        try:
            self._loop()
        finally:
            self.session.close()  # ends a response that is still open
            self._deliver(closing=True)
            summary = Summary(
                file=name,
                audio_s=self.samples / SAMPLE_RATE,
                wall_s=time.monotonic() - begun,
                chunks=self.chunks,
                responses=self.responses,
                p50_ms=self.latency.ms(50),
                p99_ms=self.latency.ms(99),
                max_ms=self.latency.ms(100),
            )
            self.output.end(summary)
        return summary

    def _loop(self) -> None:
        refused: np.ndarray | None = None  # a block for which the session's queue had no room yet
        end: Exception | None = None  # why there is no more sound
        while not self.stop.is_set():
            busy = self.engine.step() > 0
            self._deliver()
            try:
                while end is None and (block := self._next(refused, busy)) is not None:
                    refused = block
                    self._push(block)
                    refused, busy = None, True
            except QueueFullError as error:
                if not busy:  # only a clip, which is not worked off before its end, can get here
                    raise UsageProblem(too_long(self.session.config.max_queued_s)) from error
            except (Ended, AudioError) as error:
                end = error
                self._flush(end)
                continue
            self.output.tick(self.session.queued_seconds, self.latency.last_ms)
            if end is not None and not busy:
                break
        if isinstance(end, AudioError):
            raise end  # now that all that came before it was heard

    def _flush(self, end: Exception) -> None:
        if self.samples:
            self.session.flush()
        elif isinstance(end, AudioError):
            raise end
        elif self.session.config.mode == "offline":
            raise UsageProblem("there is no sound in it")

    def _next(self, refused: np.ndarray | None, busy: bool) -> np.ndarray | None:
        return self.feed.take(busy) if refused is None else refused

    def _push(self, block: np.ndarray) -> None:
        now = time.monotonic()
        self.session.push(block)
        self.latency.push(len(block), now)
        self.samples += len(block)
        self.output.sound(block)

    def _deliver(self, closing: bool = False) -> None:
        """Pass on what the session says; FastloopError where it failed (but not while closing)."""
        now = time.monotonic()
        for event in self.session.poll():
            if isinstance(event, Decision):
                self.chunks += 1
                self.latency.decide(event.chunk, now)
            elif isinstance(event, ResponseStart):
                self.responses += 1
                if self.session.config.mode == "offline":
                    self.latency.answer(now)
            elif isinstance(event, Failed) and not closing:
                raise FastloopError(event.message)
            self.output.event(event)
