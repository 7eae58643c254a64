"""Snapshot, restore, fork: as if nothing had happened, here or in another process, whatever the stream."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model, load, save
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.errors import CapacityError, SnapshotError
from fastloop.events import from_dict
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy

NEVER = DecisionPolicy(1.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def check_clean(engine: Engine) -> None:
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.cache.allocator.promised == 0


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "m"
    return save(directory, model.config, model.weights, model.tokenizer.to_json())


@settings(max_examples=10)
@given(data=st.data(), cut=st.integers(0, 60), window=st.sampled_from([None, 60.0, 1.6]))
def test_restore_and_fork_continue_as_if_nothing_had_happened(
    model: Model, policy: DecisionPolicy, data: st.DataObject, cut: int, window: float | None
) -> None:
    """Cut anywhere, also inside a response and with sound queued: both copies equal the plain loop."""
    config = SessionConfig(
        policy=policy, window_s=window, sampling=Sampling(0.9), seed=7, max_response_tokens=12
    )
    pcm = random_sound(6.0, seed=21)
    script = Script(config, pcm)
    engine = Engine(model, EngineConfig(max_sessions=2, kv_pages=300))
    session = engine.open(config)
    split = data.draw(st.integers(0, len(pcm)))
    session.push(pcm[:split])
    for _ in range(cut):
        engine.step()
    heard = session.poll() if data.draw(st.booleans()) else []
    elsewhere = Engine(model, EngineConfig(max_sessions=1, kv_pages=300, page_tokens=16))
    want = expected(model, script)
    for target, copy in ((engine, session.fork()), (elsewhere, elsewhere.restore(session.snapshot()))):
        copy.push(pcm[split:])
        target.run_until_idle()
        got = heard + copy.poll()
        assert comparable(got) == comparable(want)
        assert np.abs(chances(got) - chances(want)).max() <= 1e-5
        assert [e.seq for e in got] == list(range(len(got)))
        copy.close()
    session.push(pcm[split:])
    engine.run_until_idle()
    assert comparable(heard + session.poll()) == comparable(want), "the original goes on untouched"
    engine.close()
    check_clean(engine)


def test_damaged_and_foreign_snapshots_are_refused(model: Model) -> None:
    engine = Engine(model)
    session = engine.open()
    session.push(random_sound(1.0))
    engine.run_until_idle()
    data = session.snapshot()
    open_before = len(engine._sessions)
    for bad in (b"", b"junk", data[:-7], data[:40], data[:8] + b"x" * 50 + data[58:]):
        with pytest.raises(SnapshotError, match="take a new one"):
            engine.restore(bad)
    other = Engine(random_model(seed=4))
    with pytest.raises(SnapshotError, match="belongs to model"):
        other.restore(data)
    assert len(engine._sessions) == open_before
    session.close()
    check_clean(engine)


CONTINUE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from fastloop import Engine
torch.set_num_threads(1)
directory = Path(sys.argv[1])
engine = Engine.load(sys.argv[2])
session = engine.restore((directory / "snapshot").read_bytes())
session.push(np.load(directory / "rest.npy"))
engine.run_until_idle()
print(json.dumps([event.to_dict() for event in session.poll()]))
engine.close()
engine.check()
assert engine.cache.allocator.used == 0
"""


def test_another_process_goes_on(saved: Path, tmp_path: Path) -> None:
    """Cut inside a response, with sound queued behind it and a window that has dropped units."""
    model = load(saved)
    config = SessionConfig(
        policy=lively_policy(model), window_s=1.2, sampling=Sampling(0.9), seed=3, max_response_tokens=12
    )
    sound = random_sound(12.0, seed=4)
    engine = Engine(model, EngineConfig(max_sessions=1, page_tokens=16, kv_pages=200))
    session = engine.open(config)
    session.push(sound[:120_000])
    heard = []
    while not (session.responding and session.stream.kv.start and session.stream.spoken > 1):
        assert engine.step(), "the stream never responds behind its window"
        heard += session.poll()
    (tmp_path / "snapshot").write_bytes(session.snapshot())
    np.save(tmp_path / "rest.npy", sound[120_000:])
    command = [sys.executable, "-c", CONTINUE, str(tmp_path), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    got = heard + [from_dict(values) for values in json.loads(done.stdout)]
    want = expected(model, Script(config, sound))
    assert comparable(got) == comparable(want)
    assert np.abs(chances(got) - chances(want)).max() <= 1e-5
    assert [e.seq for e in got] == list(range(len(got)))


@given(
    edge=st.sampled_from(["reflect", "wait"]),
    rate=st.sampled_from([8_000, 16_000, 22_050, 44_100]),
    cut=st.integers(0, 40_000),
    steps=st.integers(0, 3),
)
def test_any_edge_and_rate(model: Model, edge: str, rate: int, cut: int, steps: int) -> None:
    """The restored stream and the original say the same, to the bit, whatever waits in the inbox."""
    config = SessionConfig(policy=NEVER, edge=edge, speculative_chunks=1)
    sound = np.random.default_rng(cut).uniform(-0.5, 0.5, 60_000).astype(np.float32)
    engine, other = (Engine(model, EngineConfig(max_sessions=1)) for _ in range(2))
    session = engine.open(config)
    session.push(sound[:cut], rate)
    for _ in range(steps):
        engine.step()
    copy = other.restore(session.snapshot())
    heard = []
    for s, e in ((session, engine), (copy, other)):
        s.push(sound[cut:], rate)
        s.flush()
        e.run_until_idle()
        assert s.idle and s.queued_seconds == 0
        heard.append(s.poll())
    assert heard[0] == heard[1] and len(heard[0]) == -(-60_000 * 16_000 // rate // 6400)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_offline_clip(model: Model, steps: int) -> None:
    """Before the clip is heard, behind its prompt, and inside its answer."""
    config = SessionConfig(mode="offline", user_text="what?", sampling=Sampling(1.0), seed=2)
    engine, other = (Engine(model, EngineConfig(max_sessions=1)) for _ in range(2))
    session = engine.open(config)
    session.push(random_sound(2.0))
    session.flush()
    for _ in range(steps):
        engine.step()
    copy = other.restore(session.snapshot())
    engine.run_until_idle()
    other.run_until_idle()
    events = session.poll()
    assert copy.poll() == events and events[-1].type == "response.end"


def test_a_snapshot_while_sound_comes_in(model: Model) -> None:
    """Taken between two pushes of another thread, never inside one: what is queued adds up."""
    engine = Engine(model, EngineConfig(max_sessions=2))
    session = engine.open(SessionConfig(policy=NEVER, max_queued_s=3600))
    stop = threading.Event()

    def push() -> None:
        for _ in range(3000):
            session.push(np.full(16, 0.1, np.float32))
        stop.set()

    thread = threading.Thread(target=push)
    thread.start()
    taken = []
    while not stop.is_set():
        taken.append(session.snapshot())
        engine.step()
    thread.join()
    for data in taken[:: max(1, len(taken) // 40)]:
        copy = engine.restore(data)
        stream = copy.stream
        assert stream.inbox.received == stream.inbox.waiting + 6400 * stream.taken
        copy.flush()
        engine.run_until_idle()
        assert copy.t == pytest.approx(-(-stream.inbox.received // 6400) * 0.4) and copy.idle
        copy.close()
    engine.close()
    engine.check()


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_one_changed_byte_is_a_refusal(model: Model, place: float, flip: int) -> None:
    engine = Engine(model, EngineConfig(max_sessions=2))
    session = engine.open()
    session.push(random_sound(1.0))
    engine.run_until_idle()
    data = bytearray(session.snapshot())
    data[int(place * len(data))] ^= flip
    with pytest.raises(SnapshotError, match="take a new one"):
        engine.restore(bytes(data))
    assert engine.health()["sessions"] == 1
    engine.check()


def test_no_room_to_restore_leaves_the_engine_as_it_was(model: Model) -> None:
    config = SessionConfig(policy=NEVER, window_s=None)
    engine = Engine(model, EngineConfig(max_sessions=1))
    session = engine.open(config)
    session.push(random_sound(20.0))
    engine.run_until_idle()
    data = session.snapshot()
    tight = Engine(model, EngineConfig(max_sessions=1, kv_pages=4))
    with pytest.raises(CapacityError, match="kv_pages"):
        tight.restore(data)
    tight.check()
    assert tight.cache.allocator.used == 0
    tight.open(config).close()  # the slot is free again
    with pytest.raises(CapacityError, match="max_sessions"):
        engine.restore(data)
    engine.check()


def test_a_session_of_another_engine_is_refused(model: Model) -> None:
    engine, other = (Engine(model, EngineConfig(max_sessions=1)) for _ in range(2))
    session = engine.open()
    for call in (other.snapshot, other.fork):
        with pytest.raises(ValueError, match="belongs to another engine"):
            call(session)
