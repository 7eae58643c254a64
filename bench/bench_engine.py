"""What the engine adds to the model: queues, pages, batch building, policy, events. The bar: 50 us a chunk.

pytest bench/bench_engine.py --benchmark-only
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastloop import ops
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.engine.runner import Round, StepBatch, StepResult
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model, random_sound


class NoModel:
    """A runner that computes nothing but the policy: what is left is the engine."""

    depth = 1
    replies = None

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.results: deque[StepResult] = deque()
        self.head = torch.tensor([[1.0], [-1.0]])

    def open(self, slot: int) -> None: ...

    def prime(self, pcm: np.ndarray, slot: int) -> None: ...

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None: ...

    def prepare(self, name: str, work: Callable[[], None]) -> None:
        work()

    def settle(self, name: str, work: Callable[[], None]) -> None:
        work()

    def perceive(self, rounds: Sequence[Round]) -> Tensor:
        return torch.empty(sum(len(r.slots) for r in rounds), 10, 1)

    def encode_clip(self, pcm: np.ndarray) -> Tensor:
        return torch.empty(1, 1)

    def release(self) -> None: ...

    def collect(self) -> StepResult:
        return self.results.popleft()

    def submit(self, batch: StepBatch) -> None:
        assert self.engine is not None
        for array in vars(batch).values():  # what a runner hands to the device
            if isinstance(array, np.ndarray):
                torch.from_numpy(array)
        rows = len(batch.decide_rows)
        decisions = self.engine._decisions
        p, decision = ops.decide(
            torch.ones(rows, 1),
            torch.ones(1),
            1e-6,
            self.head,
            torch.from_numpy(batch.decide_slots),
            decisions.policy,
            decisions.state,
        )
        self.results.append(StepResult(p.tolist(), decision.tolist(), [0] * len(batch.draw_rows)))


@pytest.mark.parametrize("sessions", [1, 64])
def test_overhead_per_chunk(benchmark: BenchmarkFixture, sessions: int) -> None:
    """64 sessions listen through a full 60 s window; one round = one chunk of each, push to poll."""
    runner = NoModel()
    engine = Engine(random_model(small(layers=1)), EngineConfig(max_sessions=sessions), runner=runner)
    runner.engine = engine
    opened = [engine.open(SessionConfig(policy=DecisionPolicy(threshold=1.0))) for _ in range(sessions)]
    pcm = random_sound(0.4)

    def chunk_of_each() -> int:
        for session in opened:
            session.push(pcm)
        engine.run_until_idle()
        return sum(len(session.poll()) for session in opened)

    for _ in range(170):  # fill the windows, so that eviction is part of the figure
        assert chunk_of_each() == sessions
    benchmark.pedantic(chunk_of_each, rounds=100, warmup_rounds=5)
    benchmark.extra_info["us_per_session_and_chunk"] = benchmark.stats["median"] / sessions * 1e6
    benchmark.extra_info["bar_us"] = 50
