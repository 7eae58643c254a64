"""The memory plan: exactly the pages that so many sessions can need, known before anything is allocated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastloop.checkpoint import Model
from fastloop.config import published_3b, small
from fastloop.decoder import decoder_shapes
from fastloop.encoder import encoder_shapes
from fastloop.engine import Engine
from fastloop.engine.memory import memory_plan
from fastloop.errors import CapacityError
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=3)


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize(
    "config",
    [
        SessionConfig(window_s=0.4, max_response_tokens=60),
        SessionConfig(
            window_s=6.0, max_response_tokens=9, system_prompt="a prompt that fills two pages " * 4
        ),
        SessionConfig(window_s=2.1, max_response_tokens=1, speculative_chunks=9),
    ],
)
def test_the_planned_pages_are_enough_and_not_one_session_too_many(
    model: Model, config: SessionConfig, page: int
) -> None:
    """Three sessions that answer as often and as long as they may never wait; a fourth is refused."""
    config = dataclasses.replace(config, policy=DecisionPolicy(0.0), sampling=Sampling(2.0))
    plan = Engine(model, EngineConfig(page_tokens=page)).memory_plan(3, config)
    page_bytes = Engine(model, EngineConfig(page_tokens=page, kv_pages=10)).cache.page_bytes
    pages, rest = divmod(plan.sessions * plan.kv_bytes_per_session + plan.prefix_bytes, page_bytes)
    assert rest == 0
    engine = Engine(model, EngineConfig(max_sessions=9, kv_pages=pages, page_tokens=page))
    sessions = [engine.open(config) for _ in range(3)]
    with pytest.raises(CapacityError, match="KV pool exhausted"):
        engine.open(config)
    for number, session in enumerate(sessions):
        session.push(random_sound(12.0, seed=number))
    engine.run_until_idle()
    assert all(session.idle and not any(e.type == "stalled" for e in session.poll()) for session in sessions)
    assert sum(session.stream.kv.start > 0 for session in sessions) == 3, "the windows never overflowed"
    engine.close()
    engine.check()


def test_an_offline_clip_of_the_longest_length_fits(model: Model) -> None:
    config = SessionConfig(
        mode="offline", user_text="what is it? " * 9, max_queued_s=7.3, max_response_tokens=5
    )
    plan = Engine(model).memory_plan(1, config)
    engine = Engine(model, EngineConfig(max_sessions=1))
    pages = (plan.kv_bytes_per_session + plan.prefix_bytes) // engine.cache.page_bytes
    tight = Engine(model, EngineConfig(max_sessions=1, kv_pages=pages))
    session = tight.open(config)
    session.push(np.zeros(round(7.3 * 16_000), np.float32))
    session.flush()
    tight.run_until_idle()
    assert session.poll()[-1].type == "response.end"


def test_the_published_model_is_planned_without_its_weights() -> None:
    """The design's figures: 36,864 bytes of KV a token in bfloat16, 0.64 + 2.77 + 0.31 billion parameters."""
    config = published_3b()
    count = {
        name: sum(int(np.prod(shape)) for shape in shapes.values())
        for name, shapes in (("encoder", encoder_shapes(config)), ("decoder", decoder_shapes(config)))
    }
    table = config.decoder.vocab_padded * config.decoder.width
    assert round(count["encoder"] / 1e9, 2) == 0.64
    assert round(table / 1e9, 2) == 0.31 and round((count["decoder"] - 2 * table) / 1e9, 2) == 2.77
    weights = 2 * sum(count.values())
    one, many = (memory_plan(config, weights, torch.bfloat16, n) for n in (1, 64))
    per_token = one.prefix_bytes / 64
    assert per_token == 36_864
    window = 150 * 13 * per_token
    assert window < one.kv_bytes_per_session < 1.5 * window
    assert (
        many.total_bytes - many.workspace_bytes == weights + 64 * one.kv_bytes_per_session + one.prefix_bytes
    )
    assert f"{weights / 1e6:,.1f}" in str(one) and str(many).startswith("64 sessions: ")


@pytest.mark.parametrize("sessions", [0, -1, 1.5, True, None])
def test_a_plan_for_no_sessions_is_refused(model: Model, sessions: object) -> None:
    with pytest.raises(ValueError, match="sessions must be a positive integer"):
        Engine(model).memory_plan(sessions)  # type: ignore[arg-type]
