"""Steps ahead: a step is begun before the one before it is collected, and every session says the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.engine import Engine, Session
from fastloop.engine import streams as schedule
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.runner import StepResult
from fastloop.engine.stream_simulation import BlockingStreams, Entry, hazards
from fastloop.engine.streams import STATE, Streams
from fastloop.errors import FastloopError
from fastloop.events import Event, ResponseText
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine

INITIAL = {*STATE, "mel state", "frames", "encoded", schedule.tokens(0)}
TALKS = SessionConfig(  # answers the first chunk at length
    policy=DecisionPolicy(0.0, min_gap_s=3600), sampling=Sampling(1.5), seed=4, max_response_tokens=30
)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(), seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def engine_of(model: Model, sessions: int = 4, streams: Streams | None = None, ahead: bool = True) -> Engine:
    config = EngineConfig(max_sessions=sessions, page_tokens=16, runner="captured", ahead=ahead)
    engine = Engine(model, config)
    engine.runner = CapturedRunner(model, engine.cache, engine._decisions, engine._mel, streams)
    return engine


def released(engine: Engine) -> bool:
    engine.check()
    return engine.cache.allocator.used == 0 and engine.cache.allocator.promised == 0


def check_equal(got: list[Event], want: list[Event]) -> None:
    assert comparable(got) == comparable(want)
    assert np.abs(chances(got) - chances(want)).max(initial=0) <= 1e-5


def random_script(draw: st.DrawFn, policy: DecisionPolicy, seed: int) -> Script:
    config = SessionConfig(
        policy=policy,
        sampling=Sampling(temperature=draw(st.sampled_from([0.0, 0.8, 1.5]))),
        seed=draw(st.integers(0, 99)),
        max_response_tokens=draw(st.sampled_from([1, 2, 3, 20])),
        window_s=draw(st.sampled_from([None, 60.0, 1.2])),
        speculative_chunks=draw(st.integers(1, 4)),
    )
    return Script(
        config,
        random_sound(0.4 * draw(st.integers(1, 12)), seed),
        cancel_after=draw(st.dictionaries(st.integers(0, 4), st.integers(0, 6), max_size=3)),
        start_step=draw(st.integers(0, 5)),
        push_samples=draw(st.integers(3000, 30_000)),
    )


@settings(max_examples=10)
@given(data=st.data(), sessions=st.sampled_from([1, 2, 5]), seed=st.integers(0, 2**31))
def test_ahead_says_what_the_plain_loop_says(
    model: Model, policy: DecisionPolicy, data: st.DataObject, sessions: int, seed: int
) -> None:
    """Any sessions under any delays of the streams; the order of all accesses is proven, too."""
    streams = BlockingStreams(seed)
    scripts = [data.draw(st.composite(random_script)(policy, seed=i)) for i in range(sessions)]
    engine = engine_of(model, sessions, streams)
    for got, script in zip(run_engine(engine, scripts), scripts, strict=True):
        check_equal(got, expected(model, script))
    assert released(engine) and not engine._steps.busy
    assert hazards(streams.log, INITIAL) == []


def test_ahead_and_one_by_one_are_the_same_flag(model: Model, policy: DecisionPolicy) -> None:
    """One session, so that both runs have the same batches: equal to the bit."""
    config = SessionConfig(policy=policy, sampling=Sampling(0.8), max_response_tokens=15, window_s=2.0)
    script = Script(config, random_sound(8.0, seed=2), cancel_after={1: 3}, push_samples=7000)
    ahead, single = (run_engine(engine_of(model, 1, ahead=flag), [script])[0] for flag in (True, False))
    assert ahead == single and any(isinstance(event, ResponseText) for event in ahead)
    with pytest.raises(ConfigError, match=r"EngineConfig\.ahead: must be true or false"):
        EngineConfig(ahead=2)  # type: ignore[arg-type]


def calls(log: list[Entry]) -> list[str]:
    """The host's calls that begin and read steps, in order."""
    marks = {("launch", "step"): "begin", ("host", "read ring"): "read"}
    return [marks[entry.call, entry.name] for entry in log if (entry.call, entry.name) in marks]


def test_the_host_is_one_step_ahead_of_a_response(model: Model) -> None:
    """While a token is drawn, the step of the next one waits behind it: the device never waits."""
    streams = BlockingStreams(0)
    engine = engine_of(model, 1, streams)
    session = engine.open(TALKS)
    session.push(random_sound(0.4))
    engine.run_until_idle()
    order = calls(streams.log)
    first_text = order.index("begin", 1)
    assert order[: first_text + 1] == ["begin", "read", "begin"]  # whether there is a response is not guessed
    spoken = session.stream.spoken
    assert spoken > 10
    alternating = order[first_text : first_text + 2 * spoken - 1]
    assert alternating == ["begin", *(["begin", "read"] * (spoken - 1))]
    single = BlockingStreams(0)
    engine = engine_of(model, 1, single, ahead=False)
    engine.open(TALKS).push(random_sound(0.4))
    engine.run_until_idle()
    assert calls(single.log) == ["begin", "read"] * (len(calls(single.log)) // 2)


def in_flight(model: Model, streams: Streams | None = None) -> tuple[Engine, Session, Session]:
    """Two sessions, one of which answers and has two tokens on their way or one and the plan of the next."""
    engine = engine_of(model, streams=streams)
    talker, other = engine.open(TALKS), engine.open(SessionConfig(policy=DecisionPolicy(1.0)))
    talker.push(random_sound(0.4))
    while talker.stream.spoken < 5:
        engine.step()
    assert talker.stream.ahead
    return engine, talker, other


def close(engine: Engine, talker: Session, other: Session) -> None:
    talker.close()


def close_engine(engine: Engine, talker: Session, other: Session) -> None:
    engine.close()


def cancel(engine: Engine, talker: Session, other: Session) -> None:
    assert talker.cancel()


def cancel_and_close(engine: Engine, talker: Session, other: Session) -> None:
    assert talker.cancel()
    talker.close()


@pytest.mark.parametrize("act", [close, close_engine, cancel, cancel_and_close])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_happens_to_a_session_with_steps_on_their_way(
    model: Model, act: Callable[[Engine, Session, Session], None], seed: int
) -> None:
    """Its pages go to others at once, its slot too; what the device still writes comes before them."""
    streams = BlockingStreams(seed)
    engine, talker, other = in_flight(model, streams)
    act(engine, talker, other)
    engine.check()
    if engine.health()["status"] == "draining":
        assert released(engine) and not engine._steps.busy
        return
    fresh = [
        Script(SessionConfig(policy=DecisionPolicy(0.0, min_gap_s=1.0), seed=i), random_sound(2.0, seed=i))
        for i in range(2)
    ]
    for got, script in zip(run_engine(engine, fresh), fresh, strict=True):
        check_equal(got, expected(model, script))
    engine.close()
    assert released(engine) and hazards(streams.log, INITIAL) == []


def test_a_cancel_between_two_steps_loses_nothing(model: Model) -> None:
    """What was said before it is what the plain loop says; the stream goes on as if none had been ahead."""
    engine, talker, _ = in_flight(model)
    heard = talker.poll()
    spoken = talker.stream.spoken
    assert talker.cancel()
    talker.push(random_sound(2.4, seed=7))
    engine.run_until_idle()
    heard += talker.poll()
    pcm = np.concatenate((random_sound(0.4), random_sound(2.4, seed=7)))
    check_equal(heard, expected(model, Script(TALKS, pcm, cancel_after={0: spoken})))
    assert not talker.stream.ahead


def test_a_snapshot_has_what_was_on_its_way(model: Model) -> None:
    engine, talker, _ = in_flight(model)
    before = talker.stream.spoken
    twin = engine.restore(talker.snapshot())
    assert not engine._steps.busy and talker.stream.spoken > before
    talker.push(random_sound(1.2, seed=5))
    twin.push(random_sound(1.2, seed=5))
    engine.run_until_idle()
    pcm = np.concatenate((random_sound(0.4), random_sound(1.2, seed=5)))
    want = expected(model, Script(TALKS, pcm))
    check_equal(talker.poll(), want)
    check_equal(twin.poll(), want)


def test_a_session_that_fails_with_a_token_on_its_way(model: Model) -> None:
    """Its logits become NaN; the step that was already begun for it is dropped, the other session goes on."""
    engine, talker, other = in_flight(model)
    stream = talker.stream
    page = engine.cache.k_pages[:, stream.kv.pages]
    engine.cache.k_pages[:, stream.kv.pages] = torch.full_like(page, torch.nan)
    other.push(random_sound(0.8, seed=1))
    engine.run_until_idle()
    assert talker.closed and "not finite" in (stream.failure or "") and not stream.ahead
    assert engine.counters.failures == 1 and len(chances(other.poll())) == 2
    other.close()
    assert released(engine)


def test_a_step_that_fails_ends_the_engine_and_leaks_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, talker, other = in_flight(model)

    def broken() -> StepResult:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "collect", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        for _ in range(3):
            engine.step()
    told = "RuntimeError: the device is gone"
    assert engine.health() == {"status": "failed", "reason": told, "sessions": 2}
    with pytest.raises(FastloopError, match="the engine has failed"):
        engine.step()
    talker.close()
    other.close()
    assert released(engine)


def test_a_snapshot_of_a_broken_engine_says_so(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, talker, _ = in_flight(model)

    def broken() -> StepResult:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine.runner, "collect", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        talker.snapshot()
    assert engine.health()["status"] == "failed"
    engine.close()
    assert released(engine)


def test_no_page_is_asked_for_in_vain(model: Model) -> None:
    """A token ahead that finds no page is no stall: the token on its way may be the last one."""
    config = EngineConfig(max_sessions=1, kv_pages=3, page_tokens=16, runner="captured")
    engine = Engine(model, config)
    unbounded = SessionConfig(
        policy=DecisionPolicy(0.0), sampling=Sampling(1.5), window_s=None, max_response_tokens=200
    )
    session = engine.open(unbounded)
    session.push(random_sound(0.4))
    engine.run_until_idle()
    events = session.poll()
    if session.stalled:
        assert [e.type for e in events].count("stalled") == 1 and session.stream.kv.tokens <= 48
    want = comparable(expected(model, Script(unbounded, random_sound(0.4))))
    said = comparable([e for e in events if e.type != "stalled"])
    assert said == want[: len(said)] and len(said) > 5
