"""Feeds and the loop over them: pacing, back-pressure, nothing lost, nothing piled up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.audio import AudioError
from fastloop.checkpoint import Model
from fastloop.cli import feeds
from fastloop.cli.feeds import Ended, FastFeed, Feed, LiveFeed, PacedFeed, blocks_of
from fastloop.cli.hearing import Hearing, Latency, Summary
from fastloop.cli.output import record
from fastloop.engine import Engine
from fastloop.events import Event
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_sound
from fastloop.testing.drive import Script, comparable, expected, lively_policy


class Recorder:
    """An `Output` that keeps everything."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.queued: list[float] = []
        self.summaries: list[Summary] = []

    def begin(self, name: str, seconds: float | None) -> None: ...

    def sound(self, block: np.ndarray) -> None: ...

    def event(self, event: Event) -> None:
        self.events.append(event)

    def tick(self, queued_s: float, latency_ms: float | None) -> None:
        self.queued.append(queued_s)

    def end(self, summary: Summary) -> None:
        self.summaries.append(summary)


def hear(model: Model, config: SessionConfig, feed: Feed, stop: threading.Event | None = None) -> Recorder:
    engine, recorder = Engine(model, EngineConfig(max_sessions=1)), Recorder()
    Hearing(engine, config, feed, recorder, stop or threading.Event()).run("name", None)
    engine.check()
    assert engine.cache.allocator.used == 0
    return recorder


def pieces(sound: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    yield from np.split(sound, np.cumsum(sizes))


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 300), st.integers(1, 64))
def test_blocks_are_the_same_sound(sizes: list[int], total: int, size: int) -> None:
    sound = np.arange(total, dtype=np.float32)
    blocks = list(blocks_of(pieces(sound, sizes), size))
    assert np.array_equal(np.concatenate([*blocks, np.empty(0, np.float32)]), sound)
    assert all(len(block) == size for block in blocks[:-1]) and all(0 < len(b) <= size for b in blocks)


def broken(sound: np.ndarray) -> Iterator[np.ndarray]:
    yield sound
    raise AudioError("breaks off")


@pytest.mark.parametrize(
    "feed", [lambda s: FastFeed(s, 6400), lambda s: PacedFeed(s, 16_000), lambda s: LiveFeed(s, 6400)]
)
def test_sound_that_breaks_off_is_heard_up_to_there(model: Model, feed: Callable[[Any], Feed]) -> None:
    engine, recorder = Engine(model, EngineConfig(max_sessions=1)), Recorder()
    sound, config = random_sound(0.5), SessionConfig(policy=DecisionPolicy(threshold=1))
    with pytest.raises(AudioError, match="breaks off"):
        Hearing(engine, config, feed(broken(sound)), recorder, threading.Event()).run("name", None)
    assert (recorder.summaries[0].chunks, recorder.summaries[0].audio_s) == (2, 0.5)
    assert engine.health()["sessions"] == 0


class Greedy:
    """Hands out sound whenever asked, whether the engine is busy or not."""

    def __init__(self, sound: np.ndarray, samples: int) -> None:
        self.blocks = blocks_of([sound], samples)

    def take(self, busy: bool) -> np.ndarray | None:
        for block in self.blocks:
            return block
        raise Ended


@pytest.mark.parametrize("samples", [1000, 6400, 8000])
def test_a_full_queue_loses_nothing(model: Model, samples: int) -> None:
    policy = lively_policy(model)
    config = SessionConfig(policy=policy, max_queued_s=0.9)
    sound = random_sound(8 * 0.4, seed=9)
    recorder = hear(model, config, Greedy(sound, samples))
    truth = expected(model, Script(SessionConfig(policy=policy), sound))
    assert comparable(recorder.events) == comparable(truth)
    assert max(recorder.queued) <= 0.9 and recorder.summaries[0].audio_s == 3.2


def test_a_file_is_pulled_no_faster_than_it_is_worked_off(model: Model) -> None:
    """However long the file: at most one chunk waits, so memory is constant."""
    pulled = []

    def source() -> Iterator[np.ndarray]:
        for number in range(60):
            pulled.append(number)
            yield random_sound(0.7, seed=number)

    recorder = hear(model, SessionConfig(policy=DecisionPolicy(0.5, min_gap_s=5)), FastFeed(source(), 6400))
    assert recorder.summaries[0].chunks == 105 and len(pulled) == 60
    assert max(recorder.queued) <= 0.4


def test_stop_ends_a_response_and_tells_what_was_heard(model: Model) -> None:
    stop = threading.Event()

    class StopAtText(Recorder):
        def event(self, event: Event) -> None:
            super().event(event)
            if event.type == "response.text":
                stop.set()

    engine, recorder = Engine(model, EngineConfig(max_sessions=1)), StopAtText()
    config = SessionConfig(policy=DecisionPolicy(threshold=0))
    Hearing(engine, config, FastFeed([random_sound(40)], 6400), recorder, stop).run("name", None)
    lines = [values for e in recorder.events if (values := record(e)) is not None]
    assert lines[-1]["type"] == "response.end" and lines[-1]["reason"] == "interrupt"
    assert 0.4 <= recorder.summaries[0].audio_s < 40


class Clock:
    """Stands in for time: sleeping passes it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= feeds.WAIT_S
        self.now += seconds


def test_real_time_is_the_time_at_which_sound_sounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(feeds, "time", clock)
    sound = random_sound(1.05)
    feed, at, taken = PacedFeed([sound]), [], []
    assert feed.take(busy=True) is None and clock.now == 100.0  # busy: no pause
    with pytest.raises(Ended):
        while True:
            block = feed.take(busy=False)
            if block is not None:
                at.append(clock.now - 100)
                taken.append(block)
                clock.now += 0.25 if len(at) == 4 else 0  # the engine was slow once: the feed catches up
    assert np.array_equal(np.concatenate(taken), sound)
    ends = np.cumsum([len(block) for block in taken]) / 16_000
    late = np.array(at) - ends
    assert np.all(late > -1e-6) and np.all(late[[0, 1, 2, 3, 8, 9, 10]] < 1e-6)


def test_live_sound_keeps_its_order_and_its_end() -> None:
    sound = random_sound(3.0)
    feed, taken = LiveFeed(pieces(sound, [1, 10_000, 0, 3]), 6400), []
    with pytest.raises(Ended):
        while True:
            block = feed.take(busy=False)
            if block is not None:
                assert len(block) <= 6400
                taken.append(block)
    assert np.array_equal(np.concatenate(taken), sound)


def test_live_sound_that_fails_raises_where_it_is_taken() -> None:
    def source() -> Iterator[np.ndarray]:
        yield np.zeros(10, np.float32)
        raise OSError("unplugged")

    feed = LiveFeed(source(), 6400)
    while (block := feed.take(busy=False)) is None:
        pass
    assert len(block) == 10
    with pytest.raises(OSError, match="unplugged"):
        while True:
            feed.take(busy=False)


def test_latency_counts_from_the_push_that_completed_the_chunk() -> None:
    latency = Latency(chunk_samples=100)
    for samples, now in ((60, 1.0), (60, 2.0), (60, 3.0), (60, 4.0), (20, 5.0)):
        latency.push(samples, now)
    latency.decide(0, 10.0)  # samples 0..99: complete with the push at 2.0
    latency.decide(1, 10.0)  # 100..199: 4.0
    latency.decide(2, 10.0)  # 200..299, of which 260 came: the last push
    assert list(latency.seconds) == [8.0, 6.0, 5.0]
    assert (latency.ms(50), latency.ms(99), latency.ms(100), latency.last_ms) == (6000, 8000, 8000, 5000)
    assert Latency(100).ms(50) is None and Latency(100).last_ms is None
