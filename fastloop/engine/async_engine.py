"""The engine with a thread of its own, for asyncio servers.

async with AsyncEngine(engine) as served:
    session = await served.open()
    session.push(pcm)
    async for event in session.events(): ...
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..events import Failed
from ..options import EngineConfig, SessionConfig
from .engine import Engine
from .session import Session


class AsyncEngine:
    """Drives an `Engine` from one background thread; sessions are used from any coroutine or thread.

    A failure of the model ends the thread: every session gets a `Failed` event and is closed, and
    `health()` says why. Nothing hangs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread: threading.Thread | None = None

    @classmethod
    def load(cls, name: str | Path, config: EngineConfig | None = None, **options: Any) -> AsyncEngine:
        return cls(Engine.load(name, config, **options))

    def start(self) -> None:
        """Start the thread; idempotent."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="fastloop", daemon=True)
            self._thread.start()

    async def warm_up(self, sessions: int | None = None, speakers: int | None = None) -> None:
        """`Engine.warm_up` without blocking the event loop; sessions wait for it."""
        await asyncio.to_thread(self.engine.warm_up, sessions, speakers)

    async def open(self, config: SessionConfig | None = None) -> Session:
        """`Engine.open` without blocking the event loop."""
        return await _owned(self.engine.open, config)

    async def snapshot(self, session: Session) -> bytes:
        return await asyncio.to_thread(self.engine.snapshot, session)

    async def restore(self, data: bytes) -> Session:
        return await _owned(self.engine.restore, data)

    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def health(self) -> dict[str, Any]:
        """As `Engine.health`; "failed" also when the thread is not running."""
        health = self.engine.health()
        if self._thread is None and health["status"] == "ok":
            health |= {"status": "failed", "reason": "the engine's thread is not running; call start()"}
        return health

    async def drain(self) -> None:
        """Admit no more sessions; return when everything queued has been worked off.

        Not waited for: a session that is held back because nobody takes its events, and one that stalls.
        """
        self.engine._draining = True
        await asyncio.to_thread(self._wait_idle if self._thread else self.engine.drain)

    async def close(self) -> None:
        """Stop the thread and close every session. Idempotent."""
        self._stop.set()
        self.engine._notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self.engine.close()

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _wait_idle(self) -> None:
        # `work` before `_idle`: a step clears `_idle` first, so what is seen set behind a cleared `work` is
        # the end of that step, never the end of the one before.
        while self._thread is not None and self._thread.is_alive():
            if self.engine.work.is_set():
                time.sleep(0.001)
            elif self._idle.wait(timeout=0.05):
                return

    def _run(self) -> None:
        while not self._stop.is_set():
            self._idle.clear()
            try:
                later = self.engine.begin_at() - self.engine.clock()
                if later > 0:  # a cohort forms
                    self._stop.wait(later)
                busy = self.engine.step()
            except Exception as error:  # the model failed: tell every session, never hang
                for session in list(self.engine._sessions.values()):
                    session.stream.outbox.emit(
                        Failed, message=f"the engine failed: {type(error).__name__}: {error}"
                    )
                    session.close()
                self._idle.set()
                return
            if not busy:
                self._idle.set()
                self.engine.work.wait()  # set until the next step begins, so `_wait_idle` sees one of the two


async def _owned(call: Callable[..., Session], *arguments: Any) -> Session:
    """The session that a call in another thread opens; closed there if nobody waits for it any more."""
    opening = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_abandon)
        raise


def _abandon(opening: asyncio.Future[Session]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
