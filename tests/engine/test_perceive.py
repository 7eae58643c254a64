"""Which streams are perceived in a step: nobody starves behind others, the longest wait comes first."""

from __future__ import annotations

import pytest

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine, Session
from fastloop.events import Decision
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model, random_sound

SESSIONS = 5
SILENT = DecisionPolicy(threshold=1.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1))


def opened(model: Model, edge: str, chunks: int) -> tuple[Engine, list[Session]]:
    engine = Engine(model, EngineConfig(max_sessions=SESSIONS, max_perceive_chunks=chunks))
    config = SessionConfig(policy=SILENT, edge=edge)
    return engine, [engine.open(config) for _ in range(SESSIONS)]


@pytest.mark.parametrize("edge", ["reflect", "wait"])
@pytest.mark.parametrize("chunks", [1, 2, SESSIONS])
def test_a_stream_behind_idle_ones_is_heard(model: Model, edge: str, chunks: int) -> None:
    """More streams than a step may perceive, and only the last one has sound."""
    engine, sessions = opened(model, edge, chunks)
    sessions[-1].push(random_sound(2.1))
    engine.run_until_idle()
    assert len(sessions[-1].poll()) == 5 and sessions[-1].idle
    engine.close()


def test_the_longest_wait_comes_first(model: Model) -> None:
    engine, sessions = opened(model, "reflect", 1)
    order = [3, 0, 4, 1, 2]
    for number in order:
        sessions[number].push(random_sound(0.4, seed=number))
    decided: list[int] = []
    while engine.step():
        for number, session in enumerate(sessions):
            decided += [number for event in session.poll() if isinstance(event, Decision)]
    assert decided == order
    engine.close()
