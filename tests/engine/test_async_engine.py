"""The engine with a thread of its own: events as they come, cancel, failures that end in events, no hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from fastloop.checkpoint import Model
from fastloop.engine import AsyncEngine, Engine, Session
from fastloop.errors import CapacityError, SessionClosedError
from fastloop.events import Event
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, comparable, expected, lively_policy

LIMIT_S = 60  # only a hang reaches it


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, LIMIT_S))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


async def collect(session: Session, until: int | None = None) -> list[Event]:
    """Events until Closed, or until `until` decisions came and no response is open."""
    events: list[Event] = []
    decided, open_response = 0, False
    async for event in session.events():
        events.append(event)
        decided += event.type == "decision"
        if event.type == "decision" and event.decision == "respond":  # type: ignore[attr-defined]
            open_response = True
        open_response &= event.type != "response.end"
        if until is not None and decided >= until and not open_response:
            break
    return events


def test_sessions_equal_the_plain_loop(model: Model) -> None:
    policy = lively_policy(model)

    async def main() -> None:
        async with AsyncEngine(Engine(model, EngineConfig(max_sessions=4))) as served:
            configs = [
                SessionConfig(policy=policy, sampling=Sampling(0.8), seed=i, max_response_tokens=8)
                for i in range(4)
            ]
            sounds = [random_sound(2.0, seed=i) for i in range(4)]
            sessions = [await served.open(config) for config in configs]
            listeners = [asyncio.create_task(collect(s, until=5)) for s in sessions]
            for start in range(0, 32_000, 3200):
                for session, pcm in zip(sessions, sounds, strict=True):
                    session.push(pcm[start : start + 3200])
                await asyncio.sleep(0)
            for config, pcm, listener in zip(configs, sounds, listeners, strict=True):
                assert comparable(await listener) == comparable(expected(model, Script(config, pcm)))
            await served.drain()
            with pytest.raises(CapacityError, match="draining"):
                await served.open()
            assert served.health()["status"] == "draining"
        assert all(s.closed for s in sessions)
        served.engine.check()
        assert served.engine.cache.allocator.used == 0

    run(main())


def test_a_warm_up_while_sessions_listen(model: Model) -> None:
    """The event loop goes on meanwhile; they hear what they hear without one."""

    async def main() -> None:
        config = SessionConfig(policy=lively_policy(model), max_response_tokens=6)
        script = Script(config, random_sound(2.0, seed=5), push_samples=6400)
        async with AsyncEngine(Engine(model, EngineConfig(max_sessions=2, runner="captured"))) as engine:
            session = await engine.open(config)
            session.push(script.pcm)
            warming = asyncio.ensure_future(engine.warm_up(2))
            events = await collect(session, until=5)
            await warming
            with pytest.raises(ValueError, match="sessions must be 1 to 2"):
                await engine.warm_up(3)
        assert comparable(events) == comparable(expected(model, script))

    run(main())


def test_closing_a_session_ends_its_event_stream(model: Model) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            session = await served.open()
            listener = asyncio.create_task(collect(session))
            session.push(random_sound(0.8))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(session.close)
            assert (await listener)[-1].type == "closed"

    run(main())


def test_cancel_from_a_coroutine(model: Model) -> None:
    options = SessionConfig(
        policy=DecisionPolicy(0.0, min_gap_s=60),
        sampling=Sampling(2.0),
        max_response_tokens=60_000,
        window_s=1.0,
    )

    async def main() -> None:
        async with AsyncEngine(Engine(model, EngineConfig(kv_pages=2000, max_sessions=1))) as served:
            session = await served.open(options)
            session.push(random_sound(0.4))
            kinds = []
            async for event in session.events():
                kinds.append(event.type)
                if event.type == "response.text" and not session.cancel():
                    kinds.append("ended by itself")
                if event.type == "response.end":
                    break
            session.push(random_sound(0.4))
            async for event in session.events():
                assert event.type == "decision" and event.epoch == (0 if "ended by itself" in kinds else 1)
                break

    run(main())


def test_a_model_failure_reaches_every_session(model: Model) -> None:
    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            sessions = [await served.open() for _ in range(2)]

            def broken(frames: object) -> object:
                raise RuntimeError("out of luck")

            served.engine.runner.encode = broken  # type: ignore[method-assign,assignment]
            sessions[0].push(random_sound(0.4))
            for session in sessions:
                kinds = [event.type for event in await collect(session)]
                assert kinds == ["failed", "closed"]
            assert "out of luck" in served.health()["reason"]
            with pytest.raises(SessionClosedError):
                sessions[1].push(np.zeros(10, np.float32))
            await served.drain()  # does not wait for what can no longer happen

    run(main())


def test_health_without_a_thread(model: Model) -> None:
    served = AsyncEngine(Engine(model))
    assert served.health()["status"] == "failed" and "start()" in served.health()["reason"]


# ---- drain and close


def test_drain_works_everything_off_and_events_can_still_be_taken(model: Model) -> None:
    policy = lively_policy(model)

    async def main() -> None:
        async with AsyncEngine(Engine(model, EngineConfig(max_sessions=3))) as served:
            configs = [SessionConfig(policy=policy, seed=i, max_response_tokens=20) for i in range(3)]
            sessions = [await served.open(config) for config in configs]
            sounds = [random_sound(8.0, seed=i) for i in range(3)]
            for session, pcm in zip(sessions, sounds, strict=True):
                session.push(pcm)
            await served.drain()
            for session, config, pcm in zip(sessions, configs, sounds, strict=True):
                assert session.idle and session.queued_seconds == 0
                assert comparable(session.poll()) == comparable(expected(model, Script(config, pcm)))
            await served.drain()  # again: nothing is left

    run(main())


def test_drain_without_a_thread_does_the_work_itself(model: Model) -> None:
    async def main() -> None:
        served = AsyncEngine(Engine(model))
        session = await served.open(SessionConfig(policy=DecisionPolicy(1.0)))
        session.push(random_sound(2.0))
        await served.drain()
        assert len(session.poll()) == 5
        await served.close()

    run(main())


def test_close_under_load_ends_every_stream_of_events(model: Model) -> None:
    """Responses are open, sound is queued, consumers wait: each gets its last event, no page is lost."""
    endless = SessionConfig(
        policy=DecisionPolicy(0.0), sampling=Sampling(2.0), window_s=1.0, max_response_tokens=60_000
    )

    async def main() -> None:
        engine = Engine(model, EngineConfig(max_sessions=4, kv_pages=5000))
        async with AsyncEngine(engine) as served:
            sessions = [await served.open(endless) for _ in range(4)]
            listeners = [asyncio.create_task(collect(session)) for session in sessions]
            for session in sessions:
                session.push(random_sound(20.0))
            while engine.counters.text_tokens < 40:
                await asyncio.sleep(0)
        for listener in listeners:
            kinds = [event.type for event in await listener]
            assert kinds[-1] == "closed" and kinds.count("closed") == 1
            assert kinds.count("response.start") == kinds.count("response.end")
        engine.check()
        assert engine.cache.allocator.used == 0
        await served.close()  # idempotent
        for session in sessions:
            with pytest.raises(SessionClosedError):
                session.push(random_sound(0.1))

    run(main())


def test_a_caller_that_gives_up_opening_leaves_no_session(model: Model) -> None:
    """It is cancelled while the model computes a prompt; the session that comes of it is closed."""

    async def main() -> None:
        async with AsyncEngine(Engine(model, EngineConfig(max_sessions=1))) as served:
            inside, leave = threading.Event(), threading.Event()
            prefill = served.engine.runner.prefill

            def slow(*arguments: Any) -> None:
                inside.set()
                leave.wait(LIMIT_S)
                prefill(*arguments)

            served.engine.runner.prefill = slow  # type: ignore[method-assign]
            opening = asyncio.create_task(served.open())
            await asyncio.to_thread(inside.wait, LIMIT_S)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            leave.set()
            while served.health()["sessions"] or served.engine.counters.sessions_opened == 0:
                await asyncio.sleep(0)
            (await served.open()).close()
            served.engine.check()

    run(main())


def fastloop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastloop"]


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_is_left_behind(model: Model, fails: bool) -> None:
    async def main() -> None:
        for _ in range(3):
            async with AsyncEngine(Engine(model, EngineConfig(max_sessions=1))) as served:
                served.start()  # idempotent
                assert len(fastloop_threads()) == 1
                session = await served.open()
                if fails:
                    served.engine.runner.hear = None  # type: ignore[method-assign,assignment]
                session.push(random_sound(0.4))
                await served.drain()
            assert fastloop_threads() == []

    run(main())


# ---- failures


@pytest.mark.parametrize("part", ["hear", "encode", "step", "encode_clip"])
def test_whatever_part_of_the_model_breaks_every_session_is_told(model: Model, part: str) -> None:
    def broken(*_: object) -> object:
        raise MemoryError("no more")

    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            mode = "offline" if part == "encode_clip" else "online"
            sessions = [await served.open(SessionConfig(mode=mode)), await served.open()]
            listeners = [asyncio.create_task(collect(session)) for session in sessions]
            setattr(served.engine.runner, part, broken)
            sessions[0].push(random_sound(0.4))
            sessions[0].flush()
            for listener in listeners:
                events = await listener
                assert [event.type for event in events] == ["failed", "closed"]
                assert "MemoryError: no more" in events[0].message  # type: ignore[attr-defined]
            health = served.health()
            assert (health["status"], health["sessions"]) == ("failed", 0) and "no more" in health["reason"]
            with pytest.raises(CapacityError, match=r"MemoryError: no more; open another engine"):
                await served.open()
        served.engine.check()
        assert served.engine.cache.allocator.used == 0

    run(main())


def test_a_session_that_fails_leaves_the_thread_running(model: Model) -> None:
    silent = SessionConfig(policy=DecisionPolicy(1.0))

    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            sick, well = await served.open(silent), await served.open(silent)
            for session in (sick, well):
                session.push(random_sound(0.4))
            for session in (sick, well):
                await collect(session, until=1)
            served.engine.cache.k_pages[:, sick.stream.kv.pages] = float("nan")
            for session in (sick, well):
                session.push(random_sound(0.4))
            assert [event.type for event in await collect(sick)] == ["failed", "closed"]
            assert [event.type for event in await collect(well, until=1)] == ["decision"]
            assert served.health()["status"] == "ok" and served.stats()["failures"] == 1

    run(main())


# ---- streams of events


def test_a_consumer_that_stops_loses_nothing(model: Model) -> None:
    """Broken off, cancelled while it waits, or in another event loop: the next one goes on behind it."""
    silent = SessionConfig(policy=DecisionPolicy(1.0))

    async def first(session: Session) -> Event:
        async for event in session.events():
            return event
        raise AssertionError("no event")

    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            session = await served.open(silent)
            waiting = asyncio.create_task(first(session))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            session.push(random_sound(1.6))
            seen = [await first(session)]
            seen.append(await asyncio.to_thread(asyncio.run, first(session)))
            await served.drain()
            seen += session.poll(limit=1)
            seen += await collect(session, until=1)
            assert [event.seq for event in seen] == [0, 1, 2, 3]
            while session.stream.outbox._waiters:  # the event loop closes what was broken off
                await asyncio.sleep(0)

    run(main())


def test_back_pressure_ends_when_events_are_taken(model: Model) -> None:
    held = SessionConfig(policy=DecisionPolicy(1.0), max_events=8, speculative_chunks=1)

    async def main() -> None:
        async with AsyncEngine(Engine(model)) as served:
            session = await served.open(held)
            session.push(random_sound(20.0))
            await served.drain()
            assert 8 <= len(session.stream.outbox.events) < 50
            assert len(await collect(session, until=50)) == 50

    run(main())


def test_many_coroutines_push_into_one_engine(model: Model) -> None:
    """Sound of eight streams in small pieces from eight tasks while others are opened and closed."""
    policy = lively_policy(model)

    async def stream(served: AsyncEngine, seed: int) -> None:
        config = SessionConfig(policy=policy, sampling=Sampling(0.8), seed=seed, max_response_tokens=8)
        sound, session = random_sound(2.4, seed=seed), await served.open(config)
        listener = asyncio.create_task(collect(session, until=6))
        for piece in np.array_split(sound, 31):
            session.push(piece)
            await asyncio.sleep(0)
        assert comparable(await listener) == comparable(expected(model, Script(config, sound)))
        session.close()

    async def main() -> None:
        async with AsyncEngine(Engine(model, EngineConfig(max_sessions=8))) as served:
            for first in (0, 100):
                await asyncio.gather(*(stream(served, first + seed) for seed in range(8)))
            served.engine.check()
            assert served.engine.cache.allocator.used == 0

    run(main())
