"""Live sessions against an engine: chunks arrive every 0.4 s, each session at its own time; how late are
decisions?

    populate(engine, load, count) -> sessions with full windows
    warm_up(engine, sessions, load)      where first calls are slow
    run_live(engine, sessions, load) -> LiveReport

Time is the engine's clock, so a test can run a minute of it in no time.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..engine import Engine, Session, snapshot
from ..engine.admission import chunk_due
from ..engine.stats import percentile
from ..errors import QueueFullError
from ..events import Decision, ResponseEnd
from ..options import DecisionPolicy, Sampling, SessionConfig
from .cases import random_sound

IDLE_S = 0.0005  # that the caller sleeps where nothing can be done


@dataclass(frozen=True)
class Load:
    """What comes in. responding: the share of the sessions that answer at any time, if a response of `tokens`
    tokens takes tokens / tokens_per_s seconds; the report has the true share. 0: nobody is ever answered.
    """

    seconds: float = 20.0
    window_s: float = 60.0
    responding: float = 0.0
    tokens: int = 64
    tokens_per_s: float = 50.0
    speculative_chunks: int = 4
    seed: int = 0

    def cycle(self, chunk_seconds: float) -> int:
        """Chunks from a session's response to its next one; 0: there is none."""
        if not self.responding:
            return 0
        return max(1, round(self.tokens / self.tokens_per_s / self.responding / chunk_seconds))

    def session(self, chunk_seconds: float) -> SessionConfig:
        """Of every session: whether it answers depends on time alone, never on what random weights hear."""
        cycle = self.cycle(chunk_seconds)
        policy = DecisionPolicy(0.0, min_gap_s=cycle * chunk_seconds) if cycle else DecisionPolicy(1.0)
        return SessionConfig(
            policy=policy, sampling=Sampling(1.0), max_response_tokens=self.tokens, window_s=self.window_s,
            speculative_chunks=self.speculative_chunks,
        )  # fmt: skip


@dataclass
class LiveReport:
    """What came out. Latency: from the moment a chunk was there, or the response in front of it ended, to its
    decision in the caller's hands, seconds; due one chunk later.
    """

    sessions: int
    seconds: float = 0.0  # of the clock
    latencies: list[float] = field(default_factory=list)
    missed: int = 0  # decided late, or late and not decided at the end
    undecided: int = 0  # at the end
    refused: int = 0  # chunks that found the queue full
    responding_s: float = 0.0  # of all sessions together
    busy_s: float = 0.0
    steps: int = 0
    tokens: int = 0

    def summary(self) -> dict[str, Any]:
        """Plain data; latencies in milliseconds."""
        shares = ("p50", 50.0), ("p99", 99.0), ("max", 100.0)
        latency = {name: 1e3 * percentile(self.latencies, q) for name, q in shares}
        return {
            "sessions": self.sessions,
            "seconds": self.seconds,
            "decisions": len(self.latencies),
            "latency_ms": latency,
            "missed": self.missed,
            "undecided": self.undecided,
            "refused": self.refused,
            "responding": self.responding_s / max(self.sessions * self.seconds, 1e-9),
            "tokens_per_s_each": self.tokens / max(self.responding_s, 1e-9),
            "busy": self.busy_s / max(self.seconds, 1e-9),
            "steps": self.steps,
        }


def populate(engine: Engine, load: Load, count: int) -> list[Session]:
    """`count` sessions more with full windows: one has heard its window, the others are its copies, which
    never leave the device. Where sessions answer, each is at another place of its cycle.
    """
    config, chunk_seconds = engine.model.config, engine.model.config.chunk_seconds
    first = engine.open(dataclasses.replace(load.session(chunk_seconds), policy=DecisionPolicy(1.0)))
    sound = random_sound(load.window_s, load.seed)
    piece = config.chunk_samples * max(1, int(first.config.max_queued_s / chunk_seconds / 2))
    for start in range(0, len(sound), piece):
        first.push(sound[start : start + piece])
        engine.run_until_idle()
        first.poll()
    state = snapshot.parse(engine.snapshot(first), engine.model)
    first.close()
    tensors = {n: t if n == "pcm" else t.to(engine.model.device) for n, t in state.tensors.items()}
    cycle = load.cycle(chunk_seconds)
    gaps = np.random.default_rng(load.seed).integers(0, max(cycle, 1), count)
    found = []
    for gap in gaps:
        since = {"decision": torch.tensor([int(gap), 1], dtype=torch.int32)} if cycle else {}
        copy = dataclasses.replace(state, config=load.session(chunk_seconds), tensors=tensors | since)
        found.append(engine.restore_state(copy))
    return found


def run_live(
    engine: Engine, sessions: Sequence[Session], load: Load, sleep: Callable[[float], object] = time.sleep
) -> LiveReport:
    """Feed the sessions for `load.seconds` and step the engine; what is left then counts as undecided."""
    return _Live(engine, sessions, load, sleep).run()


def warm_up(
    engine: Engine, sessions: Sequence[Session], load: Load, sleep: Callable[[float], object] = time.sleep
) -> None:
    """All that the engine can make ahead; then few sessions, then more, then all, four chunks each, for what
    it makes at a first call besides.
    """
    engine.warm_up(len(sessions))
    brief = dataclasses.replace(load, seconds=4 * engine.model.config.chunk_seconds)
    for share in (0.02, 0.1, 0.4, 1.0):
        run_live(engine, sessions[: max(1, round(share * len(sessions)))], brief, sleep)


class _Live:
    def __init__(
        self, engine: Engine, sessions: Sequence[Session], load: Load, sleep: Callable[[float], object]
    ) -> None:
        self.engine, self.sessions, self.load, self.sleep = engine, sessions, load, sleep
        self.report = LiveReport(len(sessions))
        config = engine.model.config
        self.chunk_s = config.chunk_seconds
        self.sound = random_sound(2 * self.chunk_s, load.seed + 1)[: config.chunk_samples]
        phases = np.random.default_rng(load.seed).uniform(0, self.chunk_s, len(sessions))
        rounds = range(int(load.seconds / self.chunk_s + 1e-9))
        due = [(float(phase) + k * self.chunk_s, i) for i, phase in enumerate(phases) for k in rounds]
        self.due = deque(sorted(due))
        self.arrived: list[deque[float]] = [deque() for _ in sessions]
        self.freed = [0.0] * len(sessions)
        self.began: dict[int, float] = {}  # of those that respond: since when
        self.active: set[int] = set()  # those with chunks that wait, or a response

    def run(self) -> LiveReport:
        self.engine.run_until_idle()  # what a run before this one has left
        for session in self.sessions:
            session.poll()
        clock, counters = self.engine.clock, self.engine.counters
        steps, tokens, start = counters.steps, counters.text_tokens, clock()
        end = start + self.load.seconds
        while (now := clock()) < end and (self.due or self.active):
            self._arrive(start, now)
            worked = self.engine.step()
            after = clock()
            self.report.busy_s += (after - now) * bool(worked)
            self._poll(after)
            if not worked:
                coming = min(start + self.due[0][0] if self.due else end, end)
                self.sleep(min(max(coming - after, IDLE_S / 100), IDLE_S))
        self._arrive(start, clock())  # during the last step
        self._finish(clock(), start)
        self.report.steps = counters.steps - steps
        self.report.tokens = counters.text_tokens - tokens
        return self.report

    def _arrive(self, start: float, now: float) -> None:
        while self.due and start + self.due[0][0] <= now:
            when, i = self.due.popleft()
            try:
                self.sessions[i].push(self.sound)
            except QueueFullError:
                self.report.refused += 1
                continue
            self.arrived[i].append(start + when)
            self.active.add(i)

    def _poll(self, now: float) -> None:
        for i in list(self.active):
            for event in self.sessions[i].poll():
                if isinstance(event, Decision):
                    self._decided(i, now, event.decision == "respond")
                elif isinstance(event, ResponseEnd):
                    self.freed[i] = now
                    self.report.responding_s += now - self.began.pop(i, now)
            if not self.arrived[i] and i not in self.began:
                self.active.discard(i)

    def _decided(self, i: int, now: float, responds: bool) -> None:
        came = self.arrived[i].popleft()
        self.report.latencies.append(now - max(came, self.freed[i]))
        self.report.missed += now > chunk_due(came, self.freed[i], self.chunk_s)
        if responds:
            self.began[i] = now

    def _finish(self, now: float, start: float) -> None:
        self.report.seconds = now - start
        for i, waiting in enumerate(self.arrived):
            self.report.undecided += len(waiting)
            if i in self.began:
                self.report.responding_s += now - self.began[i]
            else:
                self.report.missed += sum(now > chunk_due(c, self.freed[i], self.chunk_s) for c in waiting)
        self.report.missed += self.report.refused
