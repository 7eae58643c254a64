"""The public handle of one stream. Every method may be called from any thread at any time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ..config import SAMPLE_RATE
from ..errors import SessionClosedError
from ..events import Event
from ..options import SessionConfig
from .protocol import DONE, Stream

if TYPE_CHECKING:
    from .engine import Engine


class Session:
    """A stream opened by `Engine.open`; ids are never reused. The engine's side of it is `stream`."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self.id = stream.id
        self.config: SessionConfig = stream.config
        self.stream = stream
        self._engine = engine

    @property
    def closed(self) -> bool:
        return self.stream.outbox.closed

    @property
    def stalled(self) -> bool:
        """Waiting for KV pages that other sessions hold."""
        return self.stream.stalled

    @property
    def responding(self) -> bool:
        return self.stream.outbox.speaking is not None

    @property
    def idle(self) -> bool:
        """Nothing is left to do for the sound pushed so far (a partial chunk waits for more)."""
        return self.stream.idle

    @property
    def queued_seconds(self) -> float:
        """Sound pushed and not yet decided."""
        return self.stream.inbox.waiting / SAMPLE_RATE + self.stream.backlog_seconds

    @property
    def t(self) -> float:
        """Stream time decided so far, seconds."""
        return self.stream.t

    def push(self, pcm: object, sample_rate: int = SAMPLE_RATE) -> float:
        """Queue sound and return the seconds queued. Never waits for the model.

        pcm: float32/float64 in [-1, 1] or int16, [S] or [S, channels], numpy or torch; any length, also 0.
        Raises ValueError or TypeError for what is not sound, QueueFullError beyond max_queued_s,
        SessionClosedError after close; in each case nothing of it was taken.
        """
        self._check_open("push")
        seconds = self.stream.inbox.push(pcm, sample_rate, self.stream.backlog_seconds)
        self._engine._notify()
        return seconds

    def flush(self) -> None:
        """Decide all sound pushed so far: a partial chunk is completed with zeros. Offline: the clip ends.

        Idempotent: where nothing new was pushed, nothing happens. SessionClosedError after close.
        """
        if self.stream.clip_complete and not self.closed:
            return
        self._check_open("flush")
        if self.config.mode == "offline":
            if not self.stream.inbox.finish():
                raise ValueError("Session.flush: the clip is empty; push its sound before flush()")
            self.stream.clip_complete = True
        else:
            self.stream.inbox.flush()
        self._engine._notify()

    def poll(self, limit: int | None = None) -> list[Event]:
        """Take the events that wait, oldest first (at most `limit`). Also works after close."""
        events = self.stream.outbox.poll(limit)
        if events:
            self._engine._notify()
        return events

    async def events(self) -> AsyncIterator[Event]:
        """Yield events as they come; ends after `Closed`."""
        async for event in self.stream.outbox.stream():
            self._engine._notify()
            yield event

    def cancel(self) -> bool:
        """End the response now; the session listens on. True if there was one.

        When it returns, no text of the old epoch will be delivered any more. Idempotent, any thread.
        """
        cancelled = self.stream.outbox.cancel()
        if cancelled:
            self._engine._notify()
        return cancelled

    def close(self) -> None:
        """Give everything back. Idempotent, any thread; events can still be polled afterwards."""
        self._engine._close(self)

    def snapshot(self) -> bytes:
        """The whole state as bytes for `Engine.restore`, here or in another process. The session goes on."""
        return self._engine.snapshot(self)

    def fork(self) -> Session:
        """An independent copy of this session, undelivered events included."""
        return self._engine.fork(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self, call: str) -> None:
        if self.stream.failure is not None:
            raise SessionClosedError(
                f"Session.{call}: session {self.id} failed: {self.stream.failure}; open another"
            )
        if self.closed:
            raise SessionClosedError(f"Session.{call}: session {self.id} is closed; open another")
        if self.stream.phase == DONE or (self.stream.clip_complete and call == "push"):
            raise SessionClosedError(
                f"Session.{call}: the clip of offline session {self.id} is finished; open another session"
            )
