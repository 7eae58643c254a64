"""The harness of live sessions, on a clock of its own: nothing here waits or depends on the machine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.options import EngineConfig
from fastloop.testing.cases import random_model
from fastloop.testing.live import Load, populate, run_live, warm_up

CHUNK_S = 0.4


class Clock:
    """Seconds that pass when somebody sleeps, and with every step that has work."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=3)


def engine_of(model: Model, step_s: float, sessions: int = 8, runner: str = "eager") -> tuple[Engine, Clock]:
    """An engine whose steps take `step_s` of its clock."""
    clock = Clock()
    config = EngineConfig(max_sessions=sessions, page_tokens=16, runner=runner, admission="deadline")
    engine = Engine(model, config, clock=clock)
    inner = engine.runner.collect

    def collect() -> object:
        clock.now += step_s
        return inner()

    engine.runner.collect = collect  # type: ignore[assignment,method-assign]
    return engine, clock


def test_copies_are_sessions_whose_window_is_full(model: Model) -> None:
    engine, _ = engine_of(model, 0.001)
    load = Load(window_s=4.0, responding=0.1, tokens=5)
    sessions = populate(engine, load, 5)
    first, *others = [session.stream.kv for session in sessions]
    assert first.tokens == 10 * model.config.chunk_rows - 1  # the last decision comes with the next chunk
    for kv in others:
        assert not set(kv.pages) & set(first.pages)
        for own, copied in zip(first.export(), kv.export(), strict=True):
            assert torch.equal(own, copied) and own.any()
    gaps = {int(engine._decisions.state[session.stream.slot, 0]) for session in sessions}
    assert len(gaps) > 1 and all(session.config.policy.threshold == 0 for session in sessions)
    engine.check()


@pytest.mark.parametrize("runner", ["eager", "captured"])
def test_listeners_are_decided_after_one_step(model: Model, runner: str) -> None:
    """Every chunk of every session, none late; a step may have to wait for the one before it."""
    engine, clock = engine_of(model, 0.01, runner=runner)
    load = Load(seconds=2.0, window_s=2.0)
    told = run_live(engine, populate(engine, load, 4), load, clock.sleep).summary()
    assert told["decisions"] == 4 * 5 and told["missed"] == told["undecided"] == told["refused"] == 0
    # Of its own step, of one before it, and with steps ahead of one behind it: 10 ms each.
    assert told["latency_ms"]["p50"] >= 10 and told["latency_ms"]["max"] <= 31
    assert told["steps"] >= 5 and told["responding"] == 0 and 1.6 < told["seconds"] <= 2.0


def test_the_share_that_responds_is_what_was_asked_for(model: Model) -> None:
    """Steps of 20 ms give a response 50 tokens a second, as the load supposes."""
    engine, clock = engine_of(model, 0.02)
    load = Load(seconds=60.0, window_s=2.0, responding=0.25, tokens=40)
    told = run_live(engine, populate(engine, load, 8), load, clock.sleep).summary()
    assert told["responding"] == pytest.approx(0.25, abs=0.06)
    assert told["tokens_per_s_each"] == pytest.approx(50, rel=0.2)
    assert told["missed"] == 0 and told["decisions"] > 0.9 * 8 * 150


def test_an_engine_that_cannot_keep_up_is_found_out(model: Model) -> None:
    """One chunk a step of 0.5 s for four sessions: late decisions and chunks left at the end both count."""
    engine, clock = engine_of(model, 0.5)
    engine.config = dataclasses.replace(engine.config, max_step_rows=model.config.chunk_rows)
    load = Load(seconds=8.0, window_s=2.0, speculative_chunks=1)
    told = run_live(engine, populate(engine, load, 4), load, clock.sleep).summary()
    assert told["decisions"] + told["undecided"] <= 4 * 20
    assert told["undecided"] > 40 and told["missed"] > 50 and told["latency_ms"]["max"] > 400


def test_chunks_that_find_the_queue_full_are_missed(model: Model) -> None:
    engine, clock = engine_of(model, 0.5)
    engine.config = dataclasses.replace(engine.config, max_step_rows=model.config.chunk_rows)
    load = Load(seconds=60.0, window_s=2.0, speculative_chunks=1)
    told = run_live(engine, populate(engine, load, 8), load, clock.sleep).summary()
    assert told["refused"] > 0 and told["missed"] >= told["refused"]


def test_a_run_starts_where_nothing_is_left_of_the_one_before(model: Model) -> None:
    """Warm-ups end in the middle of responses, with chunks in the queue; none of it is counted again."""
    engine, clock = engine_of(model, 0.05, runner="captured")
    load = Load(seconds=1.2, window_s=2.0, responding=0.3, tokens=30)
    sessions = populate(engine, load, 8)
    warm_up(engine, sessions, load, clock.sleep)
    assert any(session.responding or not session.idle for session in sessions)
    report = run_live(engine, sessions, load, clock.sleep)
    assert len(report.latencies) + report.undecided == 8 * 3
    assert all(0 < latency < 1.2 for latency in report.latencies)
