"""The events of one session on their way to the caller, with the epoch fence of `cancel`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from ..events import Closed, Decision, Event, ResponseEnd, ResponseStart, ResponseText


class Outbox:
    """Events in order. A response is open between its start and its end; closing it is atomic.

    The engine emits with the epoch it planned under; after a cancel that epoch is over and what it still
    emits for the old response is dropped here, under the same lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.events: deque[Event] = deque()
        self.seq = 0
        self.epoch = 0
        self.speaking: str | None = None  # the text so far of the open response
        self.started = False  # its ResponseStart is out
        self.closed = False
        self.t = 0.0
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def emit(self, kind: type[Event], **values: Any) -> None:
        """Append an event outside responses (Decision, Stalled, Failed)."""
        with self.lock:
            self._append(kind, **values)

    def decide(self, chunk: int, t: float, respond: bool, p: float) -> None:
        """Append a decision; `respond` opens a response."""
        with self.lock:
            self.t = t
            self._append(Decision, chunk=chunk, decision="respond" if respond else "silent", p_respond=p)
            if respond:
                self.speaking, self.started = "", False

    def open_response(self, t: float) -> None:
        """Open a response without a decision (offline mode)."""
        with self.lock:
            self.t = t
            self.speaking, self.started = "", False

    def start(self, epoch: int, emotion: str | None) -> bool:
        """Append ResponseStart; False when the response was cancelled meanwhile."""
        with self.lock:
            if epoch != self.epoch or self.speaking is None:
                return False
            self.started = True
            self._append(ResponseStart, emotion=emotion)
            return True

    def say(self, epoch: int, text: str) -> bool:
        with self.lock:
            if epoch != self.epoch or self.speaking is None:
                return False
            if text:
                self.speaking += text
                self._append(ResponseText, text=text)
            return True

    def end(self, epoch: int, reason: str) -> bool:
        with self.lock:
            if epoch != self.epoch or self.speaking is None:
                return False
            self._end(reason)
            return True

    def cancel(self) -> bool:
        """End the open response as interrupted and begin a new epoch; False when none is open.

        Text of it that was not polled yet is withdrawn; the end event carries what had been said.
        """
        with self.lock:
            if self.speaking is None or self.closed:
                return False
            response = self._last_response()
            kept = [e for e in self.events if not (e.seq >= response and isinstance(e, ResponseText))]
            self.events = deque(kept)
            self.epoch += 1
            self._end("interrupt")
            return True

    def close(self) -> bool:
        """Append Closed once; False when it was closed before."""
        with self.lock:
            if self.closed:
                return False
            if self.speaking is not None:
                self._end("interrupt")
            self._append(Closed)
            self.closed = True
            return True

    def poll(self, limit: int | None = None) -> list[Event]:
        """Take the waiting events, oldest first."""
        with self.lock:
            count = len(self.events) if limit is None else min(limit, len(self.events))
            return [self.events.popleft() for _ in range(count)]

    async def stream(self) -> AsyncIterator[Event]:
        """Yield events as they come, until Closed was yielded."""
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self.lock:
            self._waiters.add(waiter)
        try:
            while True:
                waiter[1].clear()
                while event := self.poll(1):  # one at a time: a consumer that stops loses nothing
                    yield event[0]
                with self.lock:
                    if self.closed and not self.events:
                        return
                    wait = not self.events
                if wait:
                    await waiter[1].wait()
        finally:
            with self.lock:
                self._waiters.discard(waiter)

    def _end(self, reason: str) -> None:
        if not self.started:
            self._append(ResponseStart, emotion=None)
        self._append(ResponseEnd, text=self.speaking or "", reason=reason)
        self.speaking, self.started = None, False

    def _last_response(self) -> int:
        """seq of the open response's start among the waiting events; 0 when it was polled already."""
        starts = [e.seq for e in self.events if isinstance(e, ResponseStart)]
        ends = [e.seq for e in self.events if isinstance(e, ResponseEnd)]
        return max((s for s in starts if not ends or s > ends[-1]), default=(ends[-1] if ends else 0))

    def _append(self, kind: type[Event], **values: Any) -> None:
        if self.closed:
            return
        self.events.append(kind(seq=self.seq, epoch=self.epoch, t=self.t, **values))
        self.seq += 1
        for loop, event in self._waiters:
            with contextlib.suppress(RuntimeError):  # the waiter's loop is closed
                loop.call_soon_threadsafe(event.set)
