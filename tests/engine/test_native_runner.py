"""The native runner in an engine: the events of the plain loop; equal to the bit in any company."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastloop.checkpoint import Model
from fastloop.config import ConfigError
from fastloop.engine import Engine, runners
from fastloop.engine.native_runner import NativeRunner, native_precision
from fastloop.engine.runner import EagerRunner
from fastloop.events import Event
from fastloop.ops import use_backend
from fastloop.ops.native import native, reason
from fastloop.options import PRECISIONS, DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine

needs_native = pytest.mark.skipif(native is None, reason=reason)
every_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
P_TOLERANCE = 1e-5  # the contract: p_respond within 1e-5 op by op, in a call, or in the plain loop


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def scripts(policy: DecisionPolicy, count: int) -> list[Script]:
    """Streams of different lengths, starts and pushes, some greedy and some not."""
    rng = np.random.default_rng(1)
    return [
        Script(
            SessionConfig(
                policy=policy,
                sampling=Sampling(temperature=0.8 * (i % 3 > 0), top_k=20 * (i % 3 == 2), top_p=0.9),
                seed=i,
                max_response_tokens=6,
            ),
            random_sound(0.4 * int(rng.integers(2, 6)), seed=i),
            start_step=int(rng.integers(0, 6)),
            push_samples=int(rng.integers(2000, 16_000)),
        )
        for i in range(count)
    ]


def events(model: Model, streams: list[Script], **options: object) -> list[list[Event]]:
    return run_engine(
        Engine(model, EngineConfig(max_sessions=len(streams), page_tokens=16, **options)), streams
    )


def same(ours: list[Event], theirs: list[Event]) -> None:
    assert comparable(ours) == comparable(theirs)
    assert np.abs(chances(ours) - chances(theirs)).max(initial=0) <= P_TOLERANCE


def equal(ours: list[Event], theirs: list[Event]) -> None:
    """To the bit: what was said, and every p(respond)."""
    assert comparable(ours) == comparable(theirs) and np.array_equal(chances(ours), chances(theirs))


@needs_native
def test_natively_op_by_op_and_in_the_plain_loop(model: Model, policy: DecisionPolicy) -> None:
    streams = scripts(policy, 6)
    plain = [expected(model, script) for script in streams]
    responses = [e for stream in plain for e in stream if e.type == "response.end"]
    assert len(responses) > 3, "the test must hear responses"
    for ours, theirs in zip(events(model, streams, runner="native"), plain, strict=True):
        same(ours, theirs)
    for ours, theirs in zip(events(model, streams, runner="eager"), plain, strict=True):
        same(ours, theirs)
    with use_backend("cpu"):  # every op native, called one by one
        for ours, theirs in zip(events(model, streams, runner="eager"), plain, strict=True):
            same(ours, theirs)


@needs_native
@every_precision
def test_a_session_is_the_same_alone_and_among_others(
    model: Model, policy: DecisionPolicy, precision: str
) -> None:
    streams = scripts(policy, 12)
    together = events(model, streams, precision=precision)
    for i in (0, 4, 11):
        equal(together[i], events(model, [streams[i]], precision=precision)[0])


@needs_native
@every_precision
def test_threads_and_repeats_change_nothing(model: Model, policy: DecisionPolicy, precision: str) -> None:
    streams = scripts(policy, 4)
    runs = [events(model, streams, precision=precision, threads=threads) for threads in (1, 2, 3, 1)]
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            equal(ours, theirs)


@needs_native
def test_engines_in_several_threads(model: Model, policy: DecisionPolicy) -> None:
    """Each has its own team; the ops they share are safe."""
    streams = scripts(policy, 3)
    alone = events(model, streams, precision="int8", threads=2)
    heard: list[list[list[Event]]] = []
    workers = [
        threading.Thread(target=lambda: heard.append(events(model, streams, precision="int8", threads=2)))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert len(heard) == 3
    for run in heard:
        for ours, theirs in zip(run, alone, strict=True):
            equal(ours, theirs)


@needs_native
def test_which_runner_and_which_pages(model: Model) -> None:
    """auto is native on a CPU, but not while backends of ops are forced."""

    def made(**options: object) -> Engine:
        return Engine(model, EngineConfig(max_sessions=1, **options))

    assert type(made().runner) is NativeRunner and type(made(runner="native").runner) is NativeRunner
    assert type(made(runner="eager").runner) is EagerRunner
    with use_backend("linear=reference"):
        assert type(made().runner) is EagerRunner and type(made(runner="native").runner) is NativeRunner
    for precision in PRECISIONS:
        engine = made(precision=precision, threads=3)
        kept = "float32" if precision == "auto" else precision
        pages = torch.float32 if kept == "float32" else torch.bfloat16
        assert isinstance(engine.runner, NativeRunner)
        assert engine.runner.packed.precision == kept and engine.cache.k_pages.dtype == pages
    half = random_model(seed=3, dtype=torch.bfloat16)
    assert native_precision("auto", half) == "bfloat16" and native_precision("int8", half) == "int8"


def test_what_cannot_be_served(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for runner in ("eager", "captured"):
        with pytest.raises(ConfigError, match=rf"precision: the {runner} runner keeps the checkpoint's"):
            EngineConfig(runner=runner, precision="int8")
    for options, told in (
        ({"runner": "fast"}, "EngineConfig.runner: .*'fast'"),
        ({"precision": "int2"}, "EngineConfig.precision: .*'int2'"),
        ({"threads": 0}, "EngineConfig.threads: .*0"),
        ({"threads": 257}, "EngineConfig.threads: .*257"),
        ({"threads": 1.5}, "EngineConfig.threads: .*1.5"),
    ):
        with pytest.raises(ConfigError, match=told):
            EngineConfig(**options)
    monkeypatch.setattr(runners, "native", None)
    monkeypatch.setattr(runners, "reason", "fastloop._native is not built")
    assert type(Engine(model, EngineConfig()).runner) is EagerRunner
    for config in (EngineConfig(runner="native"), EngineConfig(precision="int8")):
        with pytest.raises(ConfigError, match=r"cannot serve this engine: fastloop\._native is not built"):
            Engine(model, config)
