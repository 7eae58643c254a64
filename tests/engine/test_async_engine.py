"""The engine with a thread of its own: events as they come, cancel, failures that end in events, no hang."""

from __future__ import annotations

import asyncio
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
