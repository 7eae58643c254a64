"""An hour of digital silence: decisions at every chunk, no storm of replies, no work that grows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fastloop.checkpoint import known_models, load
from fastloop.config import EncoderConfig, small
from fastloop.engine import Engine
from fastloop.events import Decision, Event, ResponseEnd
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model

CHUNKS = 9000
A_PUSH = 75  # chunks: 30 s


def an_hour(engine: Engine, policies: list[DecisionPolicy], window_s: float) -> list[list[Event]]:
    """All events of an hour of zeros, one stream a policy, side by side."""
    options = [
        SessionConfig(policy=p, window_s=window_s, speculative_chunks=25, max_response_tokens=4)
        for p in policies
    ]
    sessions = [engine.open(option) for option in options]
    heard: list[list[Event]] = [[] for _ in sessions]
    silence, rows = np.zeros(A_PUSH * 6400, np.int16), []
    for _ in range(CHUNKS // A_PUSH):
        before = engine.counters.rows
        for session in sessions:
            session.push(silence)
        engine.run_until_idle()
        for events, session in zip(heard, sessions, strict=True):
            events += session.poll()
        rows.append(engine.counters.rows - before)
    assert max(rows[60:]) <= max(rows[:60]), "work grows with the age of the streams"
    for events, session in zip(heard, sessions, strict=True):
        session.close()
        decisions = [e for e in events if isinstance(e, Decision)]
        assert [e.chunk for e in decisions] == list(range(CHUNKS)) and decisions[-1].t == 3600
        assert np.isfinite([e.p_respond for e in decisions]).all()
    engine.check()
    return heard


BOUNDS = [
    (DecisionPolicy(threshold=1.0), 0),
    (DecisionPolicy(threshold=0.0, min_gap_s=60), 60),
    (DecisionPolicy(threshold=0.0, rearm=0.0), 1),  # p(respond) never falls so low: armed once
]


def test_the_policy_bounds_the_replies_of_any_model() -> None:
    """Also of one with random weights, which has no idea what silence is."""
    config = small(layers=1)
    config = dataclasses.replace(config, encoder=EncoderConfig(layers=1, width=16, heads=1, ffn=16))
    engine = Engine(random_model(config), EngineConfig(max_sessions=len(BOUNDS)))
    heard = an_hour(engine, [policy for policy, _ in BOUNDS], window_s=3.0)
    assert [sum(isinstance(e, ResponseEnd) for e in events) for events in heard] == [n for _, n in BOUNDS]


@pytest.mark.parametrize("name", known_models())
def test_the_packaged_models_stay_silent(name: str) -> None:
    engine = Engine(load(name), EngineConfig(max_sessions=1))
    (events,) = an_hour(engine, [DecisionPolicy()], window_s=3.0)
    assert not [e for e in events if not isinstance(e, Decision)], "a reply to nothing"
