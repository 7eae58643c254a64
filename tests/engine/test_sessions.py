"""Sessions as their callers see them: isolation, cancel, close, capacity, back-pressure, snapshots."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.errors import CapacityError, FastloopError, SessionClosedError
from fastloop.events import Decision
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine

ALWAYS = DecisionPolicy(threshold=0.0)
NEVER = DecisionPolicy(threshold=1.0)
CHUNK = 6400


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def check_clean(engine: Engine) -> None:
    engine.check()
    assert engine.cache.allocator.used == 0, "closing every session must free every page"
    assert engine.cache.allocator.promised == 0


@pytest.mark.parametrize(
    ("own", "asked", "responds"), [(0.0, None, True), (1.0, None, False), (1.0, 0.0, True)]
)
def test_without_a_threshold_the_checkpoint_says_when(
    own: float, asked: float | None, responds: bool
) -> None:
    model = random_model(dataclasses.replace(small(), threshold=own))
    script = Script(SessionConfig(policy=DecisionPolicy(asked), max_response_tokens=2), random_sound(1.2))
    (heard,) = run_engine(Engine(model, EngineConfig(max_sessions=1)), [script])
    decisions = [event.decision for event in heard if isinstance(event, Decision)]
    assert decisions == ["respond" if responds else "silent"] * 3
    assert comparable(heard) == comparable(expected(model, script))


# ---- isolation ---------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(others=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_session_is_the_same_alone_and_in_any_batch(
    model: Model, policy: DecisionPolicy, others: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    config = SessionConfig(policy=policy, sampling=Sampling(0.9), seed=seed, max_response_tokens=10)
    mine = Script(config, random_sound(3.2, seed), push_samples=int(rng.integers(100, 9000)))
    crowd = [
        Script(
            SessionConfig(policy=policy, sampling=Sampling(1.2), seed=i, max_response_tokens=20),
            random_sound(0.4 * int(rng.integers(1, 12)), 1000 + i),
            start_step=int(rng.integers(0, 6)),
        )
        for i in range(others)
    ]
    alone = run_engine(Engine(model), [mine])[0]
    crowded = run_engine(Engine(model), [crowd[0], mine, *crowd[1:]])[1]
    assert comparable(alone) == comparable(crowded)
    assert np.abs(chances(alone) - chances(crowded)).max() <= 1e-5


def test_nan_in_one_sessions_state_fails_that_session_alone(model: Model) -> None:
    engine = Engine(model)
    sick, well = engine.open(SessionConfig(policy=NEVER)), engine.open(SessionConfig(policy=NEVER))
    for session in (sick, well):
        session.push(random_sound(0.4))
    engine.run_until_idle()
    engine.cache.k_pages[:, sick.stream.kv.pages] = float("nan")
    for session in (sick, well):
        session.push(random_sound(0.4, 1))
    engine.run_until_idle()
    assert [e.type for e in sick.poll()] == ["decision", "failed", "closed"]
    assert [e.type for e in well.poll()] == ["decision", "decision"]
    with pytest.raises(SessionClosedError, match="not finite"):
        sick.push(random_sound(0.4))
    well.close()
    check_clean(engine)
    reused = engine.open(SessionConfig(policy=NEVER))  # the NaN pages serve again
    reused.push(random_sound(2.0))
    engine.run_until_idle()
    assert np.isfinite(chances(reused.poll())).all()


# ---- cancel ------------------------------------------------------------------------------------------


def test_cancel_withdraws_text_and_listening_goes_on(model: Model) -> None:
    engine = Engine(model)
    session = engine.open(
        SessionConfig(policy=DecisionPolicy(0.0, min_gap_s=60), sampling=Sampling(2.0), seed=1)
    )
    session.push(random_sound(1.2))
    for _ in range(8):
        engine.step()
    assert session.responding
    assert session.cancel() and not session.cancel(), "cancel is idempotent"
    events = session.poll()
    assert [e.type for e in events] == ["decision", "response.start", "response.end"]
    assert events[-1].reason == "interrupt" and events[-1].text, "the end carries what had been said"
    assert [e.epoch for e in events] == [0, 0, 1]
    engine.run_until_idle()
    assert [(e.type, e.epoch) for e in session.poll()] == [("decision", 1), ("decision", 1)]


def test_cancel_while_listening_does_nothing(model: Model) -> None:
    engine = Engine(model)
    session = engine.open()
    assert not session.cancel()
    session.close()
    assert not session.cancel()


def test_cancel_during_a_step_is_fenced(model: Model) -> None:
    """The cancel comes while the model runs: nothing of the old epoch comes out afterwards."""
    engine = Engine(model)
    session = engine.open(SessionConfig(policy=ALWAYS, sampling=Sampling(2.0)))
    session.push(random_sound(0.4))
    for _ in range(4):
        engine.step()
    step, runner = engine.runner.step, engine.runner

    def cancel_inside(batch: object) -> object:
        assert session.cancel()
        runner.step = step  # type: ignore[method-assign]
        return step(batch)  # type: ignore[arg-type]

    runner.step = cancel_inside  # type: ignore[method-assign,assignment]
    session.poll()
    engine.step()
    assert [e.type for e in session.poll()] == ["response.end"]
    session.push(random_sound(0.4))
    engine.step()
    assert [e.type for e in session.poll()][:1] == ["decision"]


# ---- close ---------------------------------------------------------------------------------------------


def test_push_after_close_and_double_close(model: Model) -> None:
    engine = Engine(model)
    session = engine.open()
    session.push(random_sound(1.0))
    session.close()
    session.close()
    for call in (lambda: session.push(random_sound(0.1)), session.flush, session.snapshot):
        with pytest.raises(SessionClosedError, match="closed; open another"):
            call()
    assert [e.type for e in session.poll()] == ["closed"]
    check_clean(engine)


def test_close_from_another_thread_during_a_step(model: Model) -> None:
    engine = Engine(model)
    session, other = engine.open(SessionConfig(policy=NEVER)), engine.open(SessionConfig(policy=NEVER))
    for s in (session, other):
        s.push(random_sound(0.4))
    step = engine.runner.step

    def close_inside(batch: object) -> object:
        thread = threading.Thread(target=session.close)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive(), "close must not wait for the model"
        return step(batch)  # type: ignore[arg-type]

    engine.runner.step = close_inside  # type: ignore[method-assign,assignment]
    engine.step()
    assert session.closed and [e.type for e in session.poll()][-1] == "closed"
    assert [e.type for e in other.poll()] == ["decision"]
    other.close()
    check_clean(engine)


# ---- capacity ----------------------------------------------------------------------------------------


def test_open_refuses_beyond_the_slots_and_beyond_the_pages(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=2))
    first = engine.open()
    second = engine.open()
    with pytest.raises(CapacityError, match="max_sessions"):
        engine.open()
    first.push(random_sound(0.4))
    engine.run_until_idle()
    assert len(first.poll()) >= 1
    second.close()
    engine.open().close()
    tight = Engine(model, EngineConfig(max_sessions=9, kv_pages=60))
    opened = []
    with pytest.raises(CapacityError, match=r"KV pool exhausted.*kv_pages"):
        while True:
            opened.append(tight.open())
    assert opened and tight.stats()["sessions_rejected"] == 1
    for session in opened:
        session.push(random_sound(8.0))
    tight.run_until_idle()
    assert all(len(chances(s.poll())) == 20 for s in opened), "admitted sessions keep their promise"
    tight.close()
    check_clean(tight)


def test_sessions_without_a_window_stall_and_resume(model: Model) -> None:
    """No promise was made: the pool runs out, the session waits, nobody loses anything."""
    engine = Engine(model, EngineConfig(max_sessions=3, kv_pages=8, page_tokens=16))
    free = SessionConfig(policy=NEVER, window_s=None, speculative_chunks=1)
    first, second = engine.open(free), engine.open(free)
    for session in (first, second):
        session.push(random_sound(4.0))
    engine.run_until_idle()
    stalled = [s for s in (first, second) if s.stalled]
    assert stalled and engine.stats()["stalled"] == len(stalled)
    seen = {s.id: s.poll() for s in (first, second)}
    assert sum(e.type == "stalled" for e in seen[stalled[0].id]) == 1
    before = len(chances(seen[stalled[0].id]))
    other = second if stalled[0] is first else first
    other.close()
    engine.run_until_idle()
    after = stalled[0].poll()
    got = [*seen[stalled[0].id], *after]
    assert len(chances(got)) > before
    want = expected(model, Script(free, random_sound(4.0)))[: len(chances(got))]
    assert comparable([e for e in got if e.type == "decision"]) == comparable(want)
    engine.close()
    check_clean(engine)


def test_engine_failure_is_reported_and_keeps_the_books(model: Model) -> None:
    engine = Engine(model)
    session = engine.open()
    session.push(random_sound(0.4))

    def broken(batch: object) -> object:
        raise RuntimeError("no such kernel")

    engine.runner.step = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="no such kernel"):
        engine.step()
    assert engine.health()["status"] == "failed" and "no such kernel" in engine.health()["reason"]
    with pytest.raises(FastloopError, match="no such kernel"):
        engine.step()
    engine.check()
    engine.close()
    check_clean(engine)


def test_drain_works_off_the_queue_and_admits_no_more(model: Model) -> None:
    engine = Engine(model)
    session = engine.open(SessionConfig(policy=NEVER))
    session.push(random_sound(2.0))
    engine.drain()
    assert len(session.poll()) == 5
    with pytest.raises(CapacityError, match="draining"):
        engine.open()
    assert engine.health()["status"] == "draining"


# ---- what it reports


def test_stats_and_memory_plan(model: Model) -> None:
    engine = Engine(model)
    session = engine.open(SessionConfig(policy=NEVER))
    session.push(random_sound(2.0))
    engine.run_until_idle()
    stats = engine.stats()
    assert stats["chunks"] == 5 and stats["sessions"] == 1 and stats["queued_seconds"] == 0
    assert 0 < stats["latency_seconds"]["p50"] <= stats["latency_seconds"]["max"]
    plan = engine.memory_plan(8)
    pool = engine.cache.k_pages.nbytes + engine.cache.v_pages.nbytes
    assert plan.weights_bytes == sum(w.nbytes for w in model.weights.values())
    assert plan.sessions * plan.kv_bytes_per_session <= pool * 1.2
    assert plan.total_bytes > plan.weights_bytes
    assert dataclasses.replace(plan, sessions=9).total_bytes - plan.total_bytes == plan.kv_bytes_per_session
    assert torch.is_inference_mode_enabled() is False


# ---- failures --------------------------------------------------------------------------------------------


def test_nan_in_a_text_token_fails_that_session_alone(model: Model) -> None:
    engine = Engine(model)
    talking = SessionConfig(policy=DecisionPolicy(0.0, min_gap_s=60), sampling=Sampling(2.0), seed=3)
    sick, well = engine.open(talking), engine.open(talking)
    for session in (sick, well):
        session.push(random_sound(0.4))
    while sick.stream.spoken < 2:
        engine.step()
    engine.cache.v_pages[:, sick.stream.kv.pages] = float("nan")
    engine.run_until_idle()
    kinds = [e.type for e in sick.poll()]
    assert kinds[:2] == ["decision", "response.start"] and kinds[-3:] == ["failed", "response.end", "closed"]
    ends = [e for e in well.poll() if e.type == "response.end"]
    assert len(ends) == 1 and ends[0].reason in ("end", "length")
    assert engine.stats()["failures"] == 1 and engine.health()["status"] == "ok"
    well.close()
    check_clean(engine)


def test_a_prompt_that_cannot_be_computed_takes_nothing(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=1))
    prefill = engine.runner.prefill

    def broken(ids: object, pages: object) -> None:
        raise RuntimeError("no such kernel")

    engine.runner.prefill = broken  # type: ignore[method-assign,assignment]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no such kernel"):
            engine.open()
        check_clean(engine)
    engine.runner.prefill = prefill  # type: ignore[method-assign]
    session = engine.open()
    session.push(random_sound(0.4))
    engine.run_until_idle()
    assert len(session.poll()) >= 1
    session.close()
    check_clean(engine)


def test_a_prompt_is_computed_once_for_all_who_share_it(model: Model) -> None:
    """And again once its last session has closed: shared pages are counted, not kept."""
    engine = Engine(model, EngineConfig(max_sessions=4))
    computed, prefill = [], engine.runner.prefill

    def counting(ids: tuple[int, ...], pages: list[int]) -> None:
        computed.append(len(ids))
        prefill(ids, pages)

    engine.runner.prefill = counting  # type: ignore[method-assign,assignment]
    first, second = engine.open(), engine.open()
    other = engine.open(SessionConfig(system_prompt="another"))
    assert len(computed) == 2 and first.stream.kv.prefix_pages == second.stream.kv.prefix_pages
    first.close()
    third = engine.open()
    assert len(computed) == 2 and third.stream.kv.prefix_pages == second.stream.kv.prefix_pages
    for session in (second, third, other):
        session.close()
    check_clean(engine)
    engine.open().close()
    assert len(computed) == 3


def test_what_is_no_configuration_is_refused(model: Model) -> None:
    engine = Engine(model)
    for wrong in ({"mode": "online"}, "online", DecisionPolicy()):
        with pytest.raises(TypeError, match="config must be a SessionConfig"):
            engine.open(wrong)  # type: ignore[arg-type]
    check_clean(engine)
