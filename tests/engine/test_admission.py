"""The admission policy as pure functions: an order of all, deadlines first, responses at their floor rate."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import ConfigError
from fastloop.engine import Engine
from fastloop.engine.admission import (
    COHORT_ROWS,
    COHORT_S,
    FLOOR_TOKENS_PER_S,
    ORDERS,
    Waiting,
    chunk_due,
    deadline,
    fifo,
    start_at,
    take,
    token_due,
)
from fastloop.options import ADMISSIONS, DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, comparable, expected, lively_policy, run_engine

times = st.floats(0, 100)


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    count = draw(st.integers(1, 12))
    found = []
    for key in draw(st.permutations(range(count))):
        since, speaks = draw(times), draw(st.booleans())
        due = token_due(since) if speaks else chunk_due(since, draw(times), 0.4)
        rows = 1 if speaks else draw(st.sampled_from([12, 13, 26, 104]))
        found.append(Waiting(key, since, since, due, speaks, rows))
    return found


@given(queue=queues(), now=times, step=st.floats(0, 0.2))
def test_an_order_leaves_nobody_out_and_depends_on_no_order(
    queue: list[Waiting], now: float, step: float
) -> None:
    for order in ORDERS.values():
        ordered = order(queue, now, step)
        assert sorted(w.key for w in ordered) == sorted(w.key for w in queue)
        assert order(queue[::-1], now, step) == ordered


@given(queue=queues(), now=times, step=st.floats(0, 0.2))
def test_listeners_by_deadline_and_responses_behind_unless_it_is_their_last_call(
    queue: list[Waiting], now: float, step: float
) -> None:
    ordered = deadline(queue, now, step)
    listeners = [w.due for w in ordered if not w.speaks]
    assert listeners == sorted(listeners)
    for before, after in itertools.pairwise(ordered):
        if before.speaks and not after.speaks:
            assert before.due <= now + 2 * step
        if after.speaks and not before.speaks:
            assert after.due > now + 2 * step


@given(queue=queues(), now=times)
def test_fifo_is_by_arrival(queue: list[Waiting], now: float) -> None:
    since = [w.since for w in fifo(queue, now, 0.0)]
    assert since == sorted(since)


@given(queue=queues(), rows=st.integers(1, 300))
def test_a_step_takes_the_first_that_fit(queue: list[Waiting], rows: int) -> None:
    taken = take(queue, rows)
    assert taken and taken == queue[: len(taken)]
    assert len(taken) == 1 or sum(w.rows for w in taken) <= rows
    if len(taken) < len(queue):
        assert sum(w.rows for w in queue[: len(taken) + 1]) > rows


@given(queue=queues(), now=times, cohort=st.floats(0, 0.01))
def test_nobody_waits_for_a_cohort_longer_than_it_may(
    queue: list[Waiting], now: float, cohort: float
) -> None:
    begin = start_at(queue, now, cohort)
    assert now <= begin <= max(now, min(w.ready for w in queue) + cohort)
    if any(w.speaks for w in queue) or sum(w.rows for w in queue) >= COHORT_ROWS:
        assert begin == now


def test_deadlines() -> None:
    assert chunk_due(arrived=3.0, freed=1.0, chunk_seconds=0.4) == pytest.approx(3.4)
    assert chunk_due(arrived=3.0, freed=5.0, chunk_seconds=0.4) == pytest.approx(5.4)
    assert token_due(2.0) == pytest.approx(2.0 + 1 / FLOOR_TOKENS_PER_S)
    assert COHORT_S < 0.4 / 50, "a few milliseconds, no tick"


def test_a_backlog_does_not_overtake() -> None:
    """What piled up during a response became decidable when that ended, not when it arrived."""
    fresh = Waiting(key=0, since=9.9, ready=9.9, due=chunk_due(9.9, 0.0, 0.4), rows=13)
    backlog = Waiting(key=1, since=7.0, ready=10.0, due=chunk_due(7.0, 10.0, 0.4), rows=104)
    assert deadline([backlog, fresh], 10.0, 0.01) == [fresh, backlog]
    assert fifo([backlog, fresh], 10.0, 0.01) == [backlog, fresh]


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


def test_policies_of_options_and_of_the_engine_are_the_same() -> None:
    assert set(ORDERS) == set(ADMISSIONS)
    with pytest.raises(ConfigError, match=r"EngineConfig\.admission: choose from"):
        EngineConfig(admission="lifo")


@pytest.mark.parametrize(("admission", "first"), [("fifo", "answered"), ("deadline", "silent")])
def test_engine_admits_by_its_policy(model: Model, admission: str, first: str) -> None:
    """One chunk a step. One session has a backlog from its response, the other a fresh chunk."""
    engine = Engine(model, EngineConfig(max_step_rows=13, admission=admission))
    answered = engine.open(SessionConfig(policy=DecisionPolicy(0.0, min_gap_s=60), speculative_chunks=1))
    silent = engine.open(SessionConfig(policy=DecisionPolicy(1.0)))
    answered.push(random_sound(1.2, seed=1))
    engine.step()
    assert answered.responding and answered.queued_seconds == pytest.approx(0.8)
    silent.push(random_sound(0.4, seed=2))
    assert answered.cancel()
    engine.step()
    assert (silent.t, answered.t) == ((0.0, 0.8) if first == "answered" else (0.4, 0.4))
    engine.run_until_idle()
    assert (silent.t, answered.t) == pytest.approx((0.4, 1.2))


@pytest.mark.parametrize("rows", [13, 1024])
def test_by_deadline_sessions_say_what_the_plain_loop_says(model: Model, rows: int) -> None:
    policy = lively_policy(model)
    scripts = [
        Script(
            SessionConfig(policy=policy, seed=i, max_response_tokens=8),
            random_sound(2.4, seed=i),
            start_step=i,
            push_samples=5000 + 3000 * i,
        )
        for i in range(5)
    ]
    engine = Engine(model, EngineConfig(max_step_rows=rows, admission="deadline"))
    for got, script in zip(run_engine(engine, scripts), scripts, strict=True):
        assert comparable(got) == comparable(expected(model, script))
