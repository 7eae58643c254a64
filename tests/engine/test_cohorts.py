"""Cohorts and the floor rate in the engine itself, in simulated time: sound comes while the device works."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.engine import AsyncEngine, Engine, Session
from fastloop.engine.admission import COHORT_S, FLOOR_TOKENS_PER_S
from fastloop.engine.runner import Round, StepBatch, StepResult
from fastloop.events import Decision
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model

CHUNK_S = 0.4
SILENT, TALKS = DecisionPolicy(threshold=1.0), DecisionPolicy(threshold=0.0, min_gap_s=3600)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1))


@dataclass
class Clock:
    """Simulated seconds; what was put off happens as they pass."""

    now: float = 0.0
    later: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, work: Callable[[], object]) -> None:
        heapq.heappush(self.later, (when, len(self.later), work))

    def advance(self, until: float) -> None:
        while self.later and self.later[0][0] <= until:
            when, _, work = heapq.heappop(self.later)
            self.now = max(self.now, when)
            work()
        self.now = max(self.now, until)


class Device:
    """A runner that computes nothing: a step takes `step_s` and `row_s` for each row, one after another."""

    replies = None

    def __init__(self, clock: Clock, depth: int, step_s: float = 0.002, row_s: float = 1e-5) -> None:
        self.clock, self.depth, self.step_s, self.row_s = clock, depth, step_s, row_s
        self.free = 0.0
        self.longest = 0.0
        self.begun: list[float] = []  # when each step was submitted
        self.decided: list[int] = []  # chunks in each step
        self.results: deque[tuple[float, StepResult]] = deque()

    def open(self, slot: int) -> None: ...

    def prime(self, pcm: np.ndarray, slot: int) -> None: ...

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None: ...

    def prepare(self, name: str, work: Callable[[], None]) -> None:
        work()

    def settle(self, name: str, work: Callable[[], None]) -> None:
        work()

    def perceive(self, rounds: Sequence[Round]) -> Tensor:
        return torch.empty(sum(len(r.slots) for r in rounds), 10, 1)

    def encode_clip(self, pcm: np.ndarray) -> Tensor:
        return torch.empty(1, 1)

    def release(self) -> None: ...

    def submit(self, batch: StepBatch) -> None:
        seconds = self.step_s + self.row_s * len(batch.ids)
        self.longest = max(self.longest, seconds)
        self.free = max(self.free, self.clock()) + seconds
        responds = [int(slot in self.talkers) for slot in batch.decide_slots]
        result = StepResult([0.5] * len(responds), responds, [7] * len(batch.draw_rows))
        self.results.append((self.free, result))
        self.begun.append(self.clock())
        self.decided.append(len(responds))

    def collect(self) -> StepResult:
        end, result = self.results.popleft()
        self.clock.advance(end)
        return result

    talkers: frozenset[int] = frozenset()  # state slots of sessions that answer


@dataclass
class World:
    """An engine in simulated time."""

    clock: Clock
    device: Device
    engine: Engine

    @classmethod
    def create(cls, model: Model, depth: int, sessions: int, **limits: object) -> World:
        clock = Clock()
        device = Device(clock, depth)
        config = EngineConfig(max_sessions=sessions, kv_pages=64 * sessions, **limits)  # type: ignore[arg-type]
        return cls(clock, device, Engine(model, config, runner=device, clock=clock))

    def run(self, until: float) -> None:
        """As AsyncEngine does: step when `begin_at` says so; without work, sleep until something arrives."""
        while self.clock() < until:
            self.clock.advance(self.engine.begin_at())
            if not self.engine.step():
                if not self.clock.later:
                    return
                self.clock.advance(self.clock.later[0][0])


def sound(model: Model) -> np.ndarray:
    return np.zeros(model.config.chunk_samples, np.float32)


@settings(max_examples=40)
@given(
    arrivals=st.lists(st.floats(0, 2.0), min_size=1, max_size=30),
    sessions=st.integers(2, 6),
    depth=st.sampled_from([1, 2]),
    cohort=st.sampled_from([None, 0.0, 0.005]),
)
def test_nobody_waits_longer_than_a_cohort_and_the_step_before(
    model: Model, arrivals: list[float], sessions: int, depth: int, cohort: float | None
) -> None:
    world = World.create(model, depth, sessions, cohort_s=cohort)
    opened = [world.engine.open(SessionConfig(policy=SILENT)) for _ in range(sessions)]
    for i, when in enumerate(sorted(arrivals)):
        world.clock.at(when, partial(opened[i % sessions].push, sound(model)))
    world.run(10.0)
    latencies = world.engine.counters.latency_seconds.values()
    assert len(latencies) == len(arrivals)
    cohort_s = (COHORT_S if depth > 1 else 0.0) if cohort is None else cohort
    assert max(latencies) <= cohort_s + (1 + depth) * world.device.longest + 1e-9
    world.engine.close()
    world.engine.check()


def pushed(model: Model, moments: Sequence[float], sessions: int, cohort: float) -> World:
    """Each session gets one chunk at its moment; sessions without a moment only listen."""
    world = World.create(model, 2, sessions, cohort_s=cohort)
    opened = [world.engine.open(SessionConfig(policy=SILENT)) for _ in range(sessions)]
    for session, when in zip(opened, moments, strict=False):
        world.clock.at(when, partial(session.push, sound(model)))
    world.run(10.0)
    return world


def test_what_arrives_within_a_cohort_shares_a_step(model: Model) -> None:
    world = pushed(model, [1.0, 1.001, 1.0019, 1.1], sessions=5, cohort=0.002)
    assert world.device.decided == [3, 1] and world.device.begun == pytest.approx([1.002, 1.102])
    world = pushed(model, [1.0, 1.001, 1.0019, 1.1], sessions=5, cohort=0.0)
    assert world.device.decided == [1, 2, 1] and world.device.begun[0] == 1.0


def test_a_cohort_that_is_complete_begins_at_once(model: Model) -> None:
    """Nobody else could come, so nothing is won by waiting: one session never waits."""
    world = pushed(model, [1.0], sessions=1, cohort=0.002)
    assert world.device.begun == [1.0]
    world = pushed(model, [1.0] * 16, sessions=17, cohort=0.1)
    assert world.device.begun == [1.0], "16 listeners fill a cohort"


def test_a_response_is_not_held_up_by_a_cohort(model: Model) -> None:
    world = World.create(model, 1, 3, cohort_s=0.05)
    talker = world.engine.open(SessionConfig(policy=TALKS, max_response_tokens=20))
    world.device.talkers = frozenset({talker.stream.slot})
    others = [world.engine.open(SessionConfig(policy=SILENT)) for _ in range(2)]
    world.clock.at(0.01, lambda: talker.push(sound(model)))
    world.clock.at(0.07, lambda: others[0].push(sound(model)))
    world.run(10.0)
    gaps = np.diff(world.device.begun)
    assert world.device.begun[0] == pytest.approx(0.06) and gaps.max() <= 1.5 * world.device.longest


@settings(max_examples=8)
@given(
    listeners=st.integers(50, 70),
    talkers=st.integers(1, 5),
    depth=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_a_response_keeps_its_floor_rate_under_any_load_of_listeners(
    model: Model, listeners: int, talkers: int, depth: int, seed: int
) -> None:
    """Listeners bring three times what the device can do, and still each response gets its tokens."""
    rng = np.random.default_rng(seed)
    rows = model.config.chunk_rows + talkers - 1  # of a step: one listener, if all responses are in it
    world = World.create(model, depth, listeners + talkers, admission="deadline", max_step_rows=rows)
    world.device.step_s = 0.02  # 50 chunks a second
    talking = [world.engine.open(SessionConfig(policy=TALKS, max_response_tokens=60)) for _ in range(talkers)]
    world.device.talkers = frozenset(session.stream.slot for session in talking)
    silent = SessionConfig(policy=SILENT, speculative_chunks=1)
    for session in [world.engine.open(silent) for _ in range(listeners)]:
        phase = rng.uniform(0.0, CHUNK_S)
        for number in range(8):
            world.clock.at(phase + number * CHUNK_S, partial(session.push, sound(model)))
    for session in talking:
        world.clock.at(rng.uniform(0, 0.1), partial(session.push, sound(model)))
    spoken = Watch(world.clock, talking)
    while world.clock() < 3.0:
        world.clock.advance(world.engine.begin_at())
        if not world.engine.step():
            world.clock.advance(world.clock.later[0][0])
        spoken.look()
    assert min(map(len, spoken.moments)) > 2
    widest = max(float(np.diff(moments).max()) for moments in spoken.moments)
    assert widest <= 1 / FLOOR_TOKENS_PER_S + (1 + depth) * world.device.longest + 1e-9
    queued = sum(session.queued_seconds for session in world.engine._sessions.values())
    assert queued > 10, "not an overload"


@dataclass
class Watch:
    """When each session got its tokens."""

    clock: Clock
    sessions: list[Session]
    moments: list[list[float]] = field(default_factory=list)

    def look(self) -> None:
        self.moments = self.moments or [[] for _ in self.sessions]
        for session, moments in zip(self.sessions, self.moments, strict=True):
            if session.stream.spoken > len(moments):
                moments.append(self.clock())


@pytest.mark.parametrize("admission", ["fifo", "deadline"])
def test_what_is_perceived_first_is_what_is_due_first(model: Model, admission: str) -> None:
    """One chunk a step. What came in during a response is due when that has ended, if it has."""
    world = World.create(model, 1, 2, admission=admission, max_perceive_chunks=1)
    talker = world.engine.open(SessionConfig(policy=TALKS, max_response_tokens=50))
    other = world.engine.open(SessionConfig(policy=SILENT))
    world.device.talkers = frozenset({talker.stream.slot})
    talker.push(sound(model))
    world.engine.step()
    assert talker.responding
    talker.push(sound(model))
    world.clock.advance(world.clock() + 0.01)
    other.push(sound(model))
    world.engine.step()
    assert bool(chunks(other)) == (admission == "deadline")
    world.engine.step()
    assert other.t == CHUNK_S and talker.stream.heard == 2


def chunks(session: Session) -> list[Decision]:
    return [event for event in session.poll() if isinstance(event, Decision)]


def test_the_served_engine_waits_for_cohorts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks before each step when to begin, and then steps whatever else has come."""
    engine = Engine(model, EngineConfig(cohort_s=0.001))
    asked: list[float] = []
    begin_at = engine.begin_at

    def counted() -> float:
        asked.append(begin_at())
        return asked[-1]

    monkeypatch.setattr(engine, "begin_at", counted)

    async def one_decision() -> None:
        async with AsyncEngine(engine) as served:
            session = await served.open(SessionConfig(policy=SILENT))
            session.push(sound(model))
            async for event in session.events():
                assert isinstance(event, Decision)
                break

    asyncio.run(one_decision())
    assert len(asked) >= engine.counters.steps == 1


def test_cohort_seconds_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"EngineConfig\.cohort_s: must be between 0 and 0\.1"):
        EngineConfig(cohort_s=0.4)
