"""Calls from several threads at once while the engine steps: no error, no deadlock, no page lost."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine, Session
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.errors import CapacityError
from fastloop.events import Event
from fastloop.options import EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import lively_policy

LIMIT_S = 120  # only a hang reaches it


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=3)


def together(*jobs: Callable[[], object]) -> None:
    """Run all at once; the first error of any thread is raised here."""
    errors: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a call hangs"
    if errors:
        raise errors[0]


def check_order(events: list[Event]) -> None:
    """What one session said is in order: numbers and epochs rise, responses are whole, Closed comes last."""
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    assert [e.epoch for e in events] == sorted(e.epoch for e in events)
    assert [e.t for e in events] == sorted(e.t for e in events)
    inside = False
    for event in events:
        assert (event.type in ("response.text", "response.end")) <= inside
        assert not (event.type in ("response.start", "decision") and inside)
        inside = event.type == "response.start" or (inside and event.type != "response.end")
    assert not inside and [e.type for e in events].count("closed") == 1 and events[-1].type == "closed"


def test_every_call_from_every_thread(model: Model) -> None:
    """Four users open, push, cancel, flush, poll, fork, snapshot and close as they like."""
    policy = lively_policy(model)
    engine = Engine(model, EngineConfig(max_sessions=5, kv_pages=300))
    done = threading.Event()

    def step() -> None:
        while not done.is_set():
            engine.step()

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in range(6):
            config = SessionConfig(
                policy=policy, sampling=Sampling(1.0), seed=number, window_s=2.0, max_response_tokens=20
            )
            try:
                session = engine.open(config)
            except CapacityError:
                continue
            events: list[Event] = []
            for _ in range(rng.integers(1, 25)):
                act(session, rng, events)
            session.close()
            check_order(events + session.poll())

    def act(session: Session, rng: np.random.Generator, events: list[Event]) -> None:
        match rng.integers(0, 10):
            case 0 | 1 | 2 | 3:
                session.push(random_sound(float(rng.uniform(0, 1.0)), seed=1))
            case 4:
                session.cancel()
            case 5:
                session.flush()
            case 6:
                events += session.poll()
            case 7:
                assert session.snapshot()
            case 8:
                while not session.idle:
                    time.sleep(0)
            case 9:
                with contextlib.suppress(CapacityError):
                    session.fork().close()
        engine.stats()
        engine.health()

    def users() -> None:
        try:
            together(*(functools.partial(use, seed) for seed in range(4)))
        finally:
            done.set()

    together(step, users)
    engine.close()
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.cache.allocator.promised == 0
    assert engine.counters.chunks and engine.counters.text_tokens and not engine.counters.failures


def test_one_session_pulled_at_from_all_sides(model: Model) -> None:
    """Pushed, cancelled, polled and at last closed by different threads; the events, as one, are in order."""
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(
        SessionConfig(policy=lively_policy(model), max_response_tokens=30, max_queued_s=600)
    )
    events: list[Event] = []
    sound = random_sound(0.3)

    def push() -> None:
        for _ in range(80):
            session.push(sound)
        while not session.idle:
            time.sleep(0)
        session.close()

    def until_closed(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            while not session.closed:
                call()
                time.sleep(0)

        return run

    calls = (engine.step, session.cancel, lambda: events.extend(session.poll()))
    together(push, *map(until_closed, calls))
    events += session.poll()
    check_order(events)
    assert sum(e.type == "decision" for e in events) == 60
    engine.check()
    assert engine.cache.allocator.used == 0


def test_many_threads_close_the_same_session(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    for _ in range(20):
        session = engine.open()
        session.push(random_sound(0.4))
        together(*[session.close] * 6, engine.step)
        assert [e.type for e in session.poll()].count("closed") == 1
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.health()["sessions"] == 0


def test_steps_from_several_threads_take_turns(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(policy=lively_policy(model), max_response_tokens=10))
    session.push(random_sound(8.0, seed=2))
    together(*[engine.run_until_idle] * 4)
    alone = Engine(model, EngineConfig(max_sessions=1))
    other = alone.open(session.config)
    other.push(random_sound(8.0, seed=2))
    alone.run_until_idle()
    assert session.poll() == other.poll()


def test_closing_the_engine_while_sessions_are_opened(model: Model) -> None:
    for _ in range(10):
        engine = Engine(model, EngineConfig(max_sessions=8))

        def opening(engine: Engine = engine) -> None:
            for _ in range(4):
                try:
                    engine.open()
                except CapacityError as error:
                    assert "draining" in str(error) or "max_sessions" in str(error)

        together(opening, opening, engine.close)
        engine.close()
        assert engine.health()["sessions"] == 0
        engine.check()
        assert engine.cache.allocator.used == 0


def test_no_call_but_open_and_snapshot_waits_for_the_model(model: Model) -> None:
    """While a step is stuck in the model, everything else is answered."""
    engine = Engine(model, EngineConfig(max_sessions=2))
    session, other = engine.open(), engine.open()
    session.push(random_sound(0.4))
    inside, leave = threading.Event(), threading.Event()
    step = engine.runner.step

    def stuck(batch: StepBatch) -> StepResult:
        inside.set()
        assert leave.wait(LIMIT_S)
        return step(batch)

    engine.runner.step = stuck  # type: ignore[method-assign]

    def use() -> None:
        assert inside.wait(LIMIT_S)
        try:
            together(
                lambda: (session.push(random_sound(1.0)), session.flush()),
                session.poll,
                session.cancel,
                other.close,
                engine.stats,
                engine.health,
                lambda: engine.memory_plan(3),
            )
        finally:
            leave.set()

    together(engine.run_until_idle, use)
    assert other.closed and session.t == pytest.approx(1.6) and session.idle
