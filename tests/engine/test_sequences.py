"""Callers that own the loop: `step_batch` bounded or not, bad items, ends that lose nothing."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from fastloop.checkpoint import Model
from fastloop.engine import Engine, StepItem
from fastloop.events import Event
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, comparable, expected, lively_policy

CHUNK = 6400
NEVER = SessionConfig(policy=DecisionPolicy(1.0))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def config(model: Model) -> SessionConfig:
    return SessionConfig(policy=lively_policy(model), sampling=Sampling(0.8), seed=1, max_response_tokens=12)


def check_clean(engine: Engine) -> None:
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.health()["sessions"] == 0


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


class Caller:
    """Collects what each sequence said over many calls."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.heard: dict[Hashable, list[Event]] = {}

    def call(self, *items: StepItem, **options: Any) -> list[Hashable]:
        results = self.engine.step_batch(items, **options)
        for name, events in results:
            self.heard.setdefault(name, []).extend(events)
        return [name for name, _ in results]


@pytest.mark.parametrize("max_steps", [1, 3])
def test_a_bounded_call_loses_nothing(model: Model, config: SessionConfig, max_steps: int) -> None:
    """All the sound and the end come in the first call; the events come with later calls, without items."""
    engine = Engine(model)
    caller, sounds = Caller(engine), {name: random_sound(2.0, seed=i) for i, name in enumerate("abc")}
    items = [StepItem(n, pcm, start=True, end=True, config=config) for n, pcm in sounds.items()]
    assert caller.call(*items, max_steps=max_steps) == list(sounds)
    assert not any(events and events[-1].type == "closed" for events in caller.heard.values())
    for _ in range(500):
        if all(events[-1].type == "closed" for events in caller.heard.values() if events):
            break
        before = engine.counters.steps
        caller.call(max_steps=max_steps)
        assert engine.counters.steps - before <= max_steps
    for name, pcm in sounds.items():
        assert comparable(caller.heard[name]) == comparable(expected(model, Script(config, pcm)))
        assert types(caller.heard[name])[-1] == "closed"
    assert caller.call() == []
    check_clean(engine)


def test_the_end_decides_a_partial_chunk(model: Model) -> None:
    caller = Caller(Engine(model))
    caller.call(StepItem(7, random_sound(0.5), start=True, config=NEVER))
    assert types(caller.heard[7]) == ["decision"]
    caller.call(StepItem(7, end=True))
    assert types(caller.heard[7]) == ["decision", "decision", "closed"]
    check_clean(caller.engine)


def test_the_end_holds_where_the_sound_is_refused(model: Model) -> None:
    """A caller that sends its last piece with the end does not leave a session behind for ever."""
    caller = Caller(Engine(model))
    caller.call(StepItem("x", random_sound(0.4), start=True, config=NEVER))
    caller.call(StepItem("x", np.array([np.nan], np.float32), end=True))
    assert types(caller.heard["x"]) == ["decision", "rejected", "closed"]
    caller.call(StepItem("y", random_sound(400), start=True, end=True, config=NEVER))
    assert types(caller.heard["y"]) == ["rejected", "closed"]
    assert "max_queued_s" in caller.heard["y"][0].message  # type: ignore[attr-defined]
    check_clean(caller.engine)


def test_an_id_can_be_used_again(model: Model) -> None:
    caller = Caller(Engine(model))
    for _ in range(3):
        caller.call(StepItem("x", random_sound(0.4), start=True, end=True, config=NEVER))
    assert types(caller.heard["x"]) == ["decision", "closed"] * 3
    check_clean(caller.engine)


BAD = [
    (StepItem("new", random_sound(0.1)), "unknown; its first item needs start=True"),
    (StepItem("new", end=True), "unknown"),
    (StepItem("old", start=True), "was started before"),
    (StepItem("old", "sound.wav"), "is a str"),
    (StepItem("old", np.zeros((2, 2, 2), np.float32)), "3 dimensions"),
    (StepItem("old", np.zeros(4, np.float32), sample_rate=0), "sample rate: 0"),
    (StepItem("old", np.zeros(31 * 16_000, np.float32)), "nothing was taken"),
    (StepItem("new", start=True, config="loud"), "config"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("item", "told"), BAD)
def test_a_bad_item_is_rejected_alone(model: Model, item: StepItem, told: str) -> None:
    caller = Caller(Engine(model, EngineConfig(max_sessions=3)))
    begin = [StepItem(n, start=True, config=NEVER) for n in ("old", "well")]
    caller.call(*begin)
    caller.call(item, StepItem("well", random_sound(0.4)))
    assert types(caller.heard["well"]) == ["decision"]
    (rejected,) = caller.heard[item.id]
    assert rejected.type == "rejected" and told in rejected.message  # type: ignore[attr-defined]
    caller.call(StepItem("old", random_sound(0.4), end=True), StepItem("well", end=True))
    assert types(caller.heard["old"])[-2:] == ["decision", "closed"]
    caller.engine.close()
    check_clean(caller.engine)


def test_a_sequence_that_has_ended_takes_no_more_sound(model: Model, config: SessionConfig) -> None:
    caller = Caller(Engine(model))
    caller.call(StepItem("x", random_sound(2.0), start=True, end=True, config=config), max_steps=1)
    caller.call(StepItem("x", random_sound(0.4)), StepItem("x", start=True), max_steps=0)
    refused = [e.message for e in caller.heard["x"] if e.type == "rejected"]  # type: ignore[attr-defined]
    assert "takes no more sound" in refused[0] and "was started before" in refused[1]
    caller.call()
    assert [e for e in comparable(caller.heard["x"]) if e.type != "rejected"] == comparable(
        expected(model, Script(config, random_sound(2.0)))
    )
    check_clean(caller.engine)


def test_no_room_is_a_rejected_start(model: Model) -> None:
    caller = Caller(Engine(model, EngineConfig(max_sessions=1)))
    caller.call(
        StepItem("a", start=True, config=NEVER), StepItem("b", random_sound(0.4), start=True, end=True)
    )
    (rejected,) = caller.heard["b"]
    assert "max_sessions" in rejected.message  # type: ignore[attr-defined]
    caller.call(StepItem("a", end=True), StepItem("b", start=True))
    assert types(caller.heard["a"]) == ["closed"]
    caller.engine.close()
    check_clean(caller.engine)


def test_an_offline_clip_in_one_item(model: Model) -> None:
    clip = SessionConfig(mode="offline", user_text="what?", max_response_tokens=5)
    caller = Caller(Engine(model))
    caller.call(StepItem(0, random_sound(1.0), start=True, end=True, config=clip))
    assert types(caller.heard[0])[0] == "response.start" and types(caller.heard[0])[-2:] == [
        "response.end",
        "closed",
    ]
    caller.call(StepItem(1, start=True, end=True, config=clip))
    assert types(caller.heard[1]) == ["rejected", "closed"]
    assert "the clip is empty" in caller.heard[1][0].message  # type: ignore[attr-defined]
    check_clean(caller.engine)


def test_a_failed_sequence_is_forgotten(model: Model) -> None:
    engine = Engine(model)
    caller = Caller(engine)
    caller.call(StepItem("x", random_sound(0.4), start=True, config=NEVER))
    engine.cache.k_pages.fill_(float("nan"))
    caller.call(StepItem("x", random_sound(0.4)))
    assert types(caller.heard["x"]) == ["decision", "failed", "closed"]
    caller.call(StepItem("x", random_sound(0.4)))
    assert "unknown" in caller.heard["x"][-1].message  # type: ignore[attr-defined]
    check_clean(engine)


def test_step_batch_equals_sessions_and_isolates_bad_items(model: Model, config: SessionConfig) -> None:
    engine = Engine(model)
    sounds = {name: random_sound(2.0, seed=i) for i, name in enumerate("abc")}
    heard: dict[str, list] = {name: [] for name in sounds}
    for start in range(0, 5 * CHUNK, CHUNK):
        items = [
            StepItem(n, pcm[start : start + CHUNK], start == 0, start == 4 * CHUNK, config=config)
            for n, pcm in sounds.items()
        ]
        bad = (
            StepItem("c", np.array([np.nan], np.float32))
            if start == CHUNK
            else StepItem("nobody", sounds["a"])
        )
        results = engine.step_batch([*items, bad])
        assert results[-1][1][-1].type == "rejected"
        for name, events in results[:-1]:
            heard[str(name)] += events
    for name, pcm in sounds.items():
        want = expected(model, Script(config, pcm))
        assert comparable(heard[name]) == comparable(want)
        assert heard[name][-1].type == "closed"
    check_clean(engine)
