"""Where sound comes from and when: a file as fast as the engine allows or at real-time speed, or live sound.

A feed hands out float32 mono blocks at 16 kHz. `take(busy)` returns the next block, None where there is
none yet, and raises `Ended` behind the last (AudioError where the sound breaks off). It never waits long,
so that a response in progress goes on and Ctrl-C is heard.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from ..audio import AudioError
from ..config import SAMPLE_RATE

WAIT_S = 0.05  # the longest pause of `take`
LIVE_BLOCKS = 16  # read ahead of live sound; a pipe's writer waits beyond that


class Ended(Exception):
    """There is no more sound."""


class Feed(Protocol):
    def take(self, busy: bool) -> np.ndarray | None:
        """The next block, or None. busy: the engine has work to do, so do not pause."""


def blocks_of(sound: Iterable[np.ndarray], samples: int) -> Iterator[np.ndarray]:
    """The same sound in blocks of `samples`; the last may be shorter, also where the sound breaks off."""
    parts: list[np.ndarray] = []
    missing = samples
    broken: AudioError | None = None
    try:
        for block in sound:
            while len(block) >= missing:
                yield np.concatenate([*parts, block[:missing]])
                block, parts, missing = block[missing:], [], samples
            if len(block):
                parts.append(block)
                missing -= len(block)
    except AudioError as error:
        broken = error
    if parts:
        yield np.concatenate(parts)
    if broken is not None:
        raise broken


class FastFeed:
    """A file: one more block whenever the engine has nothing left to do."""

    def __init__(self, sound: Iterable[np.ndarray], samples: int) -> None:
        self._blocks = blocks_of(sound, samples)

    def take(self, busy: bool) -> np.ndarray | None:
        return None if busy else _next(self._blocks)


class PacedFeed:
    """A file at real-time speed: a block is handed out when its last sample would have sounded."""

    def __init__(self, sound: Iterable[np.ndarray], samples: int = SAMPLE_RATE // 10) -> None:
        self._blocks = blocks_of(sound, samples)
        self._block: np.ndarray | None = None
        self._due: float | None = None  # monotonic seconds

    def take(self, busy: bool) -> np.ndarray | None:
        if self._block is None:
            self._block = _next(self._blocks)
            started = time.monotonic() if self._due is None else self._due
            self._due = started + len(self._block) / SAMPLE_RATE
        assert self._due is not None
        late = time.monotonic() - self._due
        if late < 0:
            if not busy:
                time.sleep(min(-late, WAIT_S))
            return None
        block, self._block = self._block, None
        return block


class LiveFeed:
    """A microphone or a pipe: blocks as they come, read by a thread of its own.

    The thread is a daemon: it may wait for sound for ever, the program does not.
    """

    def __init__(self, sound: Iterable[np.ndarray], samples: int) -> None:
        self._queue: queue.Queue[np.ndarray | BaseException] = queue.Queue(LIVE_BLOCKS)
        self._sound, self._samples = sound, samples
        threading.Thread(target=self._read, name="fastloop-sound", daemon=True).start()

    def take(self, busy: bool) -> np.ndarray | None:
        try:
            item = self._queue.get(timeout=None if busy else WAIT_S, block=not busy)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def _read(self) -> None:
        end: BaseException = Ended()
        try:
            for block in self._sound:
                for start in range(0, len(block), self._samples):
                    self._queue.put(block[start : start + self._samples])
        except BaseException as error:  # it is raised again where the sound is taken
            end = error
        self._queue.put(end)


def _next(blocks: Iterator[np.ndarray]) -> np.ndarray:
    try:
        return next(blocks)
    except StopIteration:
        raise Ended from None
