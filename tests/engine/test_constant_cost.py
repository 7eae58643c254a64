"""Two hours of sound through a 60 s window: nothing grows with the age of a stream."""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time

import numpy as np
import pytest

from fastloop.config import EncoderConfig, small
from fastloop.engine import Engine
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model

HOURS = 2.0
CHUNKS_A_STEP = 10


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Work:
    """What an engine did up to now, as counters: they are the same on every machine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.slots, inner = engine, 0, engine.runner.step

        def step(batch: StepBatch) -> StepResult:
            self.slots += int(batch.kv_lens.sum())
            return inner(batch)

        engine.runner.step = step  # type: ignore[method-assign]

    def read(self) -> np.ndarray:
        """Steps, rows of the decoder, text tokens, slots that attention read."""
        counted = self.engine.counters
        return np.array([counted.steps, counted.rows, counted.text_tokens, self.slots])


@pytest.mark.slow
def test_two_hours_at_constant_time_and_memory() -> None:
    config = small(layers=1)
    config = dataclasses.replace(config, encoder=EncoderConfig(layers=1, width=16, heads=1, ffn=16))
    engine = Engine(random_model(config), EngineConfig(max_sessions=1))
    work = Work(engine)
    options = SessionConfig(
        policy=DecisionPolicy(threshold=0.0, min_gap_s=300),
        max_response_tokens=8,
        speculative_chunks=CHUNKS_A_STEP,
    )
    session = engine.open(options)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (7, CHUNKS_A_STEP * 6400)).astype(np.float32)
    pushes = round(HOURS * 3600 / 0.4 / CHUNKS_A_STEP)
    seconds, resident, slots, pages, done, events = [], [], [], [], [work.read()], 0
    for i in range(pushes):
        began = time.thread_time()
        session.push(noise[i % len(noise)])
        engine.run_until_idle()
        events += len(session.poll())
        seconds.append(time.thread_time() - began)
        slots.append(session.stream.kv.kv_len)
        pages.append(engine.cache.allocator.used)
        done.append(work.read())
        if i % (pushes // 10) == pushes // 10 - 1:
            gc.collect()
            resident.append(resident_bytes())
    tenth = pushes // 10
    assert session.t == 7200 and events > pushes * CHUNKS_A_STEP
    # The window is full after 15 pushes: the first tenth is counted from the middle of itself on.
    first, last = slice(tenth // 2, tenth + tenth // 2), slice(-tenth, None)
    most = options.most_tokens(engine.model.config)
    assert most is not None
    assert max(slots) <= most + 2 * engine.cache.page_tokens, "attention reads more than the window"
    assert max(pages) <= engine._quota(options) + len(session.stream.kv.prefix_pages), (
        "pages grow with the stream"
    )
    assert len(session.stream.units) <= 150 + 8 + 1
    each = np.diff(done, axis=0)
    assert np.all(np.abs(each[last].sum(0) - each[first].sum(0)) <= 0.01 * each[first].sum(0)), "work grows"
    # Of time only a ratio: work that grew with the stream would make it 16.
    assert statistics.median(seconds[last]) <= 3 * statistics.median(seconds[first])
    assert resident[-1] - resident[1] <= 4 << 20, "memory grows with the stream"
