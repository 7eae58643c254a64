"""The public engine: opens sessions, steps them together, answers for the memory.

    engine = Engine(load("demo"))
    session = engine.open()
    session.push(pcm)            # any size, any thread
    engine.run_until_idle()      # or step() in a loop of your own; AsyncEngine has a thread for it
    for event in session.poll(): ...

No thread is started here. `step` may be called from any thread, one at a time; the rest of the API from
any thread at any time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Model, load
from ..decision import DecisionState
from ..errors import CapacityError, FastloopError
from ..events import Event
from ..mel import MelState
from ..options import EngineConfig, SessionConfig
from ..text import prefix_ids
from . import perceive, snapshot
from .admission import COHORT_S, start_at
from .buckets import SPARE_STREAMS
from .kv_cache import KVCache, KVSequence, pages_for
from .memory import MemoryPlan, memory_plan, session_pages
from .protocol import LISTENING, Stream
from .runner import Runner
from .runners import kv_dtype, kv_layout, make_runner
from .sequences import Sequences, StepItem
from .session import Session
from .snapshot import SnapshotState
from .stats import Counters
from .steps import Steps


@dataclass
class Prefix:
    """The pages of one prompt, shared by every session that starts with it."""

    pages: list[int]
    length: int


class Engine:
    """Sessions over one model. See the module's docstring; errors are in fastloop.errors."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        runner: Runner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.clock = clock  # seconds; what arrives and what is due is told by it
        self.config = config or EngineConfig()
        self.counters = Counters()
        self._dtype = kv_dtype(self.config, model)
        layout = None if runner else kv_layout(self.config, model)
        self.cache = KVCache(
            model.config, self._pool_pages(), self.config.page_tokens, self._dtype, model.device, layout
        )
        # One slot more than sessions: a captured step puts its padding there.
        self._decisions = DecisionState(self.config.max_sessions + 1, model.device)
        slots = self.config.max_sessions + 2 * SPARE_STREAMS  # as above, for captured perception
        self._mel = MelState.empty(slots, device=model.device)
        self.runner = runner or make_runner(self.config, model, self.cache, self._decisions, self._mel)
        self._steps = Steps(self)
        self._sessions: dict[int, Session] = {}
        self.cache.order = lambda name, work: self.runner.prepare(name, work)
        self._sequences = Sequences(self)
        self._prefixes: dict[tuple[int, ...], Prefix] = {}
        self._free_slots = list(range(self.config.max_sessions - 1, -1, -1))
        self._next_id = 0
        self._closing: set[Session] = set()
        self._closing_lock = threading.Lock()
        self._step_lock = threading.Lock()
        self.work = threading.Event()  # set when there may be something to do
        self._draining = False
        self._failure: str | None = None

    @classmethod
    def load(cls, name: str | Path, config: EngineConfig | None = None, **options: Any) -> Engine:
        """An engine over a checkpoint: a packaged name or a directory (`fastloop.checkpoint.load`)."""
        return cls(load(name, **options), config)

    def warm_up(self, sessions: int | None = None, speakers: int | None = None) -> None:
        """Capture now the steps that so many sessions need, of which so many speak at once, and compile their
        kernels: on a GPU 0.1 s for each size of steps, minutes where nothing was ever compiled. None:
        max_sessions; all of them.

        Call it before serving, so that nobody waits for it later. What is still made at its first occurrence:
        steps of sessions that catch up, with more than a chunk each, or whose contexts have more than 64
        pages (a window of two minutes); edge="wait"; offline clips; prefixes; replies of a single stream in
        one graph. Runners that capture nothing have nothing to do. ValueError where sessions is not 1 to
        max_sessions, or speakers not 0 to sessions; FastloopError where the engine has failed or is closing.
        """
        count = self.config.max_sessions if sessions is None else sessions
        draws = count if speakers is None else speakers
        for name, given, low, high in (
            ("sessions", count, 1, self.config.max_sessions),
            ("speakers", draws, 0, count),
        ):
            if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
                raise ValueError(f"Engine.warm_up: {name} must be {low} to {high}, got {given!r}")
        with self._step_lock:
            self._check_alive("warm_up")
            if self._draining:
                raise FastloopError("Engine.warm_up: the engine is draining; open another engine")
            self._collect_all()
            rows = min(count * self.model.config.chunk_rows, self.config.max_step_rows)
            try:
                self.runner.warm_up(rows, draws, min(count, self.config.max_perceive_chunks))
            except Exception as error:
                self._fall(error)
                raise

    # ---- sessions ------------------------------------------------------------------------------------

    def open(self, config: SessionConfig | None = None) -> Session:
        """Admit one more stream. Waits for the step in progress, if any.

        CapacityError where a session slot or its KV pages cannot be had; nothing else is touched.
        """
        config = SessionConfig() if config is None else config
        if not isinstance(config, SessionConfig):
            raise TypeError(f"Engine.open: config must be a SessionConfig, got {config!r}")
        with self._step_lock:
            return self._admit(config)

    def fork(self, session: Session) -> Session:
        """An independent copy of a session."""
        return self.restore(self.snapshot(session))

    def snapshot(self, session: Session) -> bytes:
        """A session's whole state as bytes; waits for the step in progress and for those on their way."""
        if session._engine is not self:
            raise ValueError(
                f"session {session.id} belongs to another engine; call its own snapshot() or fork()"
            )
        with self._step_lock:
            session._check_open("snapshot")
            self._collect_all()
            session._check_open("snapshot")  # what was on its way may have ended it
            taken: list[bytes] = []
            self.runner.settle("snapshot", lambda: taken.append(snapshot.dump(session)))
            return taken[0]

    def restore(self, data: bytes) -> Session:
        """Open the session of a snapshot taken from the same model. SnapshotError, CapacityError."""
        return self.restore_state(snapshot.parse(data, self.model))

    def restore_state(self, state: SnapshotState) -> Session:
        """`restore` of a parsed snapshot, whose tensors may lie on the engine's device already."""
        with self._step_lock:
            session = self._admit(state.config)
            try:
                self.runner.settle("restore", lambda: snapshot.fill(session, state))
            except BaseException:
                self._release(session)
                raise
        self._notify()
        return session

    def _admit(self, config: SessionConfig) -> Session:
        self._reap_held()
        try:
            return self._try_admit(config)
        except CapacityError:
            self.counters.sessions_rejected += 1
            raise

    def _try_admit(self, config: SessionConfig) -> Session:
        if self._failure is not None or self._draining:
            raise CapacityError(
                f"Engine.open: {self._failure or 'the engine is draining'}; open another engine"
            )
        if not self._free_slots:
            raise CapacityError(
                f"Engine.open: all {self.config.max_sessions} sessions are in use; close one, or raise "
                "EngineConfig.max_sessions (Engine.memory_plan tells what that needs)"
            )
        ids = tuple(prefix_ids(self.model.config, self.model.tokenizer, config.mode, config.system_prompt))
        allocator, prefix = self.cache.allocator, self._prefixes.get(ids)
        new = prefix is None
        if prefix is None:
            pages = allocator.allocate(pages_for(len(ids), self.cache.page_tokens), "the prefix")
            prefix = Prefix(pages, len(ids))
        else:
            allocator.retain(prefix.pages)
        lease = None
        try:
            lease = allocator.lease(self._quota(config), f"session {self._next_id}")
            if new:
                self.runner.prefill(ids, prefix.pages)
        except BaseException:
            allocator.release(prefix.pages)
            if lease is not None:
                lease.close()
            raise
        self._prefixes[ids] = prefix
        slot = self._free_slots.pop()
        self.runner.open(slot)
        self.runner.prepare("open", lambda: self._decisions.reset(slot, config.policy, self.model.config))
        kv = KVSequence(self.cache, lease, prefix.pages, prefix.length)
        stream = Stream(
            self.model, self._next_id, slot, config, kv, lambda: self._fail(session), clock=self.clock
        )
        session = Session(self, stream)
        self._sessions[session.id] = session
        self._next_id += 1
        self.counters.sessions_opened += 1
        return session

    def _fail(self, session: Session) -> None:
        """A stream cannot go on (it has said why): count it and close it."""
        self.counters.failures += 1
        session.close()

    def _close(self, session: Session) -> None:
        if session.stream.outbox.close():
            with self._closing_lock:
                self._closing.add(session)
        self._reap()
        self._notify()

    def _reap(self) -> None:
        """Release closed sessions now, unless a step is running: then it does so when it ends."""
        while self._closing and self._step_lock.acquire(blocking=False):
            try:
                self._reap_held()
            finally:
                self._step_lock.release()

    def _reap_held(self) -> None:
        with self._closing_lock:
            closing, self._closing = self._closing, set()
        for session in closing:
            self._release(session)

    def _release(self, session: Session) -> None:
        """Under the step lock: pages, slot and prefix of a session go back. Idempotent.

        What a step on its way still writes there comes before whatever their next owner does.
        """
        if self._sessions.pop(session.id, None) is None:
            return
        session.stream.retract()
        session.stream.kv.lease.close()
        freed = set(self.cache.allocator.release(session.stream.kv.prefix_pages))
        if freed:
            self._prefixes = {k: p for k, p in self._prefixes.items() if not freed & set(p.pages)}
        self._free_slots.append(session.stream.slot)

    # ---- the step ------------------------------------------------------------------------------------

    def step(self) -> int:
        """Perceive what is queued and run one ragged pass of the decoder.

        With a runner that takes steps ahead (EngineConfig.ahead), a pass is begun here and its results are
        taken by the next call, behind the beginning of the next pass.

        Returns the number of chunks perceived plus sequences begun or ended; 0 means there is nothing to do
        now, and nothing on its way.
        """
        with self._step_lock:
            self._reap_held()
            self._check_alive("step")
            self.work.clear()
            begun = self.clock()
            try:
                work = perceive.perceive(self) + self._steps.advance(begun)
            except Exception as error:
                self._fall(error)
                raise
            if work:
                self.counters.step_seconds.add(self.clock() - begun)
        self._reap()
        return work

    def begin_at(self) -> float:
        """When `step` should be called, seconds of `clock`, for whoever calls it as sound arrives: now, or a
        moment later so that a cohort can form (EngineConfig.cohort_s), never for a tick. A hint: `step` does
        what there is to do at any time.
        """
        cohort_s = self.config.cohort_s
        if cohort_s is None:
            cohort_s = COHORT_S if self.runner.depth > 1 else 0.0
        with self._step_lock:
            now = self.clock()
            if not cohort_s or self._steps.busy:
                return now
            found = [(stream, stream.waiting or stream.unheard) for stream in self._streams()]
        waiting = [w for _, w in found if w is not None]
        others = any(w is None and s.phase == LISTENING and not s.outbox.closed for s, w in found)
        return start_at(waiting, now, cohort_s, others) if waiting else now

    def run_until_idle(self) -> int:
        """Step until nothing can be done now; returns the number of steps."""
        steps = 0
        while self.step():
            steps += 1
        return steps

    def step_batch(
        self, items: Sequence[StepItem], max_steps: int | None = None
    ) -> list[tuple[Hashable, list[Event]]]:
        """For callers that own the loop: push every item's sound, step, return every item's events.

        max_steps: None steps until idle; a small number bounds the time of one call, and what is left goes
        on in the next one, also without items. Behind the items come the ended sequences that still had
        something to say; the last event of a sequence is `Closed`. What is wrong with one item is a
        `Rejected` event of that item alone: nothing of its sound was taken, its `end` holds, the others go
        on.
        """
        return self._sequences.step(items, max_steps)

    def _collect_all(self) -> None:
        """Take the results of everything on its way. A step that fails ends the engine, as in `step`."""
        try:
            self._steps.collect_all()
        except Exception as error:
            self._fall(error)
            raise

    def _check_alive(self, call: str) -> None:
        if self._failure is not None:
            raise FastloopError(f"Engine.{call}: the engine has failed: {self._failure}; open another engine")

    def _fall(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"
        self._steps.drop()

    def _streams(self) -> list[Stream]:
        return [session.stream for session in list(self._sessions.values())]

    def _notify(self) -> None:
        if not self.work.is_set():  # `step` clears it before it looks: what is queued by now is found
            self.work.set()

    # ---- what it reports -------------------------------------------------------------------------------

    def memory_plan(self, sessions: int, config: SessionConfig | None = None) -> MemoryPlan:
        """Bytes for `sessions` sessions of one configuration (window_s=None is counted as 60 s)."""
        config = config or SessionConfig()
        prompt = self._prompt_tokens(config)
        weights = self.model.weight_bytes
        return memory_plan(self.model.config, weights, self._dtype, sessions, self.config, config, prompt)

    def stats(self) -> dict[str, Any]:
        """Counters, latency percentiles and the state of the pool, as plain data."""
        allocator = self.cache.allocator
        sessions = list(self._sessions.values())
        return self.counters.summary() | {
            "sessions": len(sessions),
            "responding": sum(s.responding for s in sessions),
            "stalled": sum(s.stalled for s in sessions),
            "queued_seconds": sum(s.queued_seconds for s in sessions),
            "kv_pages": allocator.pages,
            "kv_pages_used": allocator.used,
            "kv_pages_promised": allocator.promised,
        }

    def health(self) -> dict[str, Any]:
        """{"status": "ok" | "draining" | "failed", "reason": ..., "sessions": ...}."""
        status = "failed" if self._failure else "draining" if self._draining else "ok"
        return {"status": status, "reason": self._failure, "sessions": len(self._sessions)}

    def drain(self) -> None:
        """Admit no more sessions and work off what is queued; sessions stay open for their last events."""
        self._draining = True
        self.run_until_idle()

    def close(self) -> None:
        """Close every session and free the runner's graphs. Idempotent; waits for the step in progress."""
        self._draining = True
        with self._step_lock:  # a session that is being opened is open by now, or will not be
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close()
        self._sequences.clear()
        with self._step_lock, contextlib.suppress(Exception):  # told by `health`
            self._collect_all()
            self.runner.release()

    def check(self) -> None:
        """The page books against what the sessions say; AssertionError where they differ."""
        with self._step_lock:
            self._reap_held()
            sequences = [session.stream.kv for session in self._sessions.values()]
            self.cache.allocator.check([kv.prefix_pages for kv in sequences])
            for kv in sequences:
                kv.check()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _quota(self, config: SessionConfig) -> int:
        return session_pages(self.model.config, self.config, config, self._prompt_tokens(config))

    def _prompt_tokens(self, config: SessionConfig) -> tuple[int, int]:
        """(prefix tokens, user text tokens) of a configuration."""
        tokenizer = self.model.tokenizer
        prefix = prefix_ids(self.model.config, tokenizer, config.mode, config.system_prompt)
        return len(prefix), len(tokenizer.encode(config.user_text or ""))

    def _pool_pages(self) -> int:
        if self.config.kv_pages is not None:
            return self.config.kv_pages
        default = SessionConfig()
        prefix = pages_for(self._prompt_tokens(default)[0], self.config.page_tokens)
        return self.config.max_sessions * self._quota(default) + 2 * prefix
