"""Sound into a session: what is taken, what is refused, bounds, rates, the end of a stream or a clip."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import soxr
import torch

from fastloop.checkpoint import Model
from fastloop.engine import Engine, Session
from fastloop.errors import QueueFullError, SessionClosedError
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import chances

NEVER = DecisionPolicy(threshold=1.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


def test_queue_bound_refuses_the_whole_push(model: Model) -> None:
    engine = Engine(model)
    session = engine.open(SessionConfig(max_queued_s=1.0, policy=NEVER))
    assert session.push(random_sound(0.9)) == pytest.approx(0.9)
    with pytest.raises(QueueFullError, match="nothing was taken"):
        session.push(random_sound(0.2))
    assert session.queued_seconds == pytest.approx(0.9)
    engine.run_until_idle()
    assert session.queued_seconds == pytest.approx(0.1)
    session.push(random_sound(0.9))


@pytest.mark.parametrize(
    ("pcm", "error", "match"),
    [
        (np.array([0.0, np.nan], np.float32), ValueError, "1"),
        (np.array([np.inf], np.float32), ValueError, "0"),
        (np.float32(0.0), ValueError, "dimension|0-d|1-D"),
        (np.zeros((2, 2, 2), np.float32), ValueError, "dimension|3-d|1-D"),
        (np.zeros(4, np.complex64), TypeError, "complex64"),
        (np.zeros(4, np.uint8), TypeError, "uint8"),
        ("sound.wav", TypeError, "str"),
    ],
)
def test_push_refuses_what_is_not_sound(
    model: Model, pcm: object, error: type[Exception], match: str
) -> None:
    session = Engine(model).open()
    with pytest.raises(error, match=match):
        session.push(pcm)
    assert session.queued_seconds == 0


@pytest.mark.parametrize("rate", [0, -1, float("nan"), "16000", True, 10**9])
def test_push_refuses_rates(model: Model, rate: object) -> None:
    session = Engine(model).open()
    with pytest.raises((ValueError, TypeError), match="rate"):
        session.push(random_sound(0.1), sample_rate=rate)  # type: ignore[arg-type]
    assert session.queued_seconds == 0


def test_empty_push_and_flush_of_nothing(model: Model) -> None:
    engine = Engine(model)
    session = engine.open()
    assert session.push(np.zeros(0, np.float32)) == 0
    session.flush()
    assert engine.run_until_idle() == 0 and session.poll() == []


def test_flush_decides_a_partial_chunk_once(model: Model) -> None:
    engine = Engine(model)
    for edge in ("reflect", "wait"):
        session = engine.open(SessionConfig(policy=NEVER, edge=edge))
        session.push(random_sound(0.5))
        session.flush()
        session.flush()
        engine.run_until_idle()
        assert [e.t for e in session.poll()] == pytest.approx([0.4, 0.8]), edge
        session.push(random_sound(0.4))
        session.flush()
        engine.run_until_idle()
        assert [e.t for e in session.poll()] == pytest.approx([1.2]), edge
        session.close()


def test_unpolled_events_hold_the_session_back_and_lose_nothing(model: Model) -> None:
    engine = Engine(model)
    session = engine.open(SessionConfig(policy=NEVER, max_events=8, speculative_chunks=4))
    session.push(random_sound(12.0))
    engine.run_until_idle()
    held = len(session.poll())
    assert 8 <= held < 8 + 4
    total = held
    while engine.run_until_idle():
        total += len(session.poll())
    assert total == 30


def test_a_refused_push_leaves_the_stream_as_it_was(model: Model) -> None:
    """Between good pushes, of any kind of bad one: the decisions are those of the good ones alone."""
    sound, engine = random_sound(1.6, seed=3), Engine(model, EngineConfig(max_sessions=2))
    clean, disturbed = (engine.open(SessionConfig(policy=NEVER, max_queued_s=2.0)) for _ in range(2))
    bad: list[tuple[object, int]] = [
        (np.array([np.nan] * 100, np.float32), 16_000),
        (np.zeros((2, 3, 4), np.float32), 16_000),
        (np.zeros(100, np.int64), 16_000),
        (np.full(100, 1e4, np.float32), 16_000),
        (np.zeros(100, np.float32), 0),
        (np.zeros(100, np.float32), 44_100.5),  # type: ignore[list-item]
        (np.zeros(16_000 * 3, np.float32), 16_000),
        (None, 16_000),
    ]
    for piece in np.array_split(sound, len(bad)):
        for session in (clean, disturbed):
            session.push(piece)
        pcm, rate = bad.pop()
        before = disturbed.queued_seconds
        with pytest.raises((ValueError, TypeError, QueueFullError)):
            disturbed.push(pcm, rate)
        assert disturbed.queued_seconds == before
    engine.run_until_idle()
    heard = [chances(session.poll()) for session in (clean, disturbed)]
    assert len(heard[0]) == 4 and np.abs(heard[0] - heard[1]).max() <= 1e-5


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["online", "offline"])
def test_other_rates_lose_nothing(model: Model, kind: str, rate: int) -> None:
    """Pushed in pieces at `rate`, or resampled beforehand as a whole: the same chunks, the same answer."""
    seconds = 1.3
    sound = np.interp(
        np.arange(round(seconds * rate)) / rate, np.arange(20_800) / 16_000, random_sound(seconds)
    )
    sound = sound.astype(np.float32)
    whole = sound if rate == 16_000 else soxr.resample(sound, rate, 16_000, quality="HQ").astype(np.float32)
    config = SessionConfig(mode=kind, policy=NEVER, max_response_tokens=8)
    engine = Engine(model, EngineConfig(max_sessions=2))
    pieces, at_once = engine.open(config), engine.open(config)
    for piece in np.array_split(sound, 7):
        pieces.push(piece, rate)
    at_once.push(whole)
    heard = []
    for session in (pieces, at_once):
        session.flush()
        engine.run_until_idle()
        heard.append(session.poll())
    assert pieces.stream.inbox.received == at_once.stream.inbox.received, "samples were held back"
    assert [e.type for e in heard[0]] == [e.type for e in heard[1]]
    if kind == "online":
        assert np.abs(chances(heard[0]) - chances(heard[1])).max() <= 1e-5
    else:
        assert heard[0][-1] == heard[1][-1]


def test_a_clip_shorter_than_the_resampler_holds_back(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(mode="offline", max_response_tokens=3))
    session.push(np.ones(60, np.int16), 48_000)
    session.flush()
    engine.run_until_idle()
    assert session.poll()[-1].type == "response.end" and session.stream.inbox.received == 20


def test_a_rate_can_change_behind_a_flush_only(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(policy=NEVER))
    session.push(random_sound(0.4)[:3000], 48_000)
    with pytest.raises(ValueError, match=r"16000 after 48000; call flush\(\) before changing"):
        session.push(random_sound(0.4))
    session.flush()
    session.push(random_sound(0.4))
    engine.run_until_idle()
    assert len(session.poll()) == 2


def test_flush_and_close_of_a_clip_can_be_repeated(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(mode="offline", max_response_tokens=3))
    with pytest.raises(ValueError, match="the clip is empty; push its sound"):
        session.flush()
    session.push(random_sound(0.5))
    for _ in range(3):
        session.flush()
        engine.run_until_idle()
    with pytest.raises(SessionClosedError, match="the clip of offline session 0 is finished; open another"):
        session.push(random_sound(0.1))
    assert [e.type for e in session.poll()].count("response.end") == 1
    session.close()
    session.close()
    engine.check()


def test_what_is_taken_out_of_the_queue_counts_until_it_is_decided(model: Model) -> None:
    """Seen from inside a step, sound being perceived is neither lost nor room for more."""
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(policy=NEVER, max_queued_s=2.0))
    session.push(random_sound(2.0))
    encode, seen = engine.runner.encode, []

    def watch(frames: torch.Tensor) -> torch.Tensor:
        seen.append((session.queued_seconds, session.idle, engine.stats()["queued_seconds"]))
        with pytest.raises(QueueFullError):
            session.push(random_sound(0.1))
        return encode(frames)

    engine.runner.encode = watch  # type: ignore[method-assign]
    engine.run_until_idle()
    assert seen == [(pytest.approx(2.0), False, pytest.approx(2.0))]
    assert session.queued_seconds == 0 and session.idle


@pytest.mark.parametrize("edge", ["reflect", "wait"])
def test_single_samples_cost_no_more_memory_than_seconds(model: Model, edge: str) -> None:
    """What waits is kept in few pieces however it came, and each chunk knows when it was complete."""
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(SessionConfig(policy=NEVER, edge=edge))
    inbox, sound = session.stream.inbox, random_sound(1.3)
    for sample in sound[:, None]:
        session.push(sample)
    assert len(inbox.blocks) <= 5 and len(inbox._arrivals) <= 4
    assert np.array_equal(inbox.export()[0], sound)
    engine.run_until_idle()
    left = 0.1 - session.stream.inbox.lead_samples / 16_000
    assert len(session.poll()) == 3 and session.queued_seconds == pytest.approx(left, abs=1e-9)
    assert engine.stats()["latency_seconds"]["p50"] > 0


def test_threads_push_into_their_own_sessions(model: Model) -> None:
    """Four writers and a stepping thread: every sample of every session is decided, in order."""
    engine = Engine(model, EngineConfig(max_sessions=4))
    sounds = [random_sound(4.0, seed=i) for i in range(4)]
    sessions = [engine.open(SessionConfig(policy=NEVER)) for _ in sounds]

    def write(session: Session, sound: np.ndarray) -> None:
        for piece in np.array_split(sound, 97):
            session.push(piece)

    writers = [threading.Thread(target=write, args=pair) for pair in zip(sessions, sounds, strict=True)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        engine.step()
    engine.run_until_idle()
    for session, sound in zip(sessions, sounds, strict=True):
        alone = Engine(model, EngineConfig(max_sessions=1))
        single = alone.open(SessionConfig(policy=NEVER))
        single.push(sound)
        alone.run_until_idle()
        assert np.abs(chances(session.poll()) - chances(single.poll())).max() <= 1e-5
