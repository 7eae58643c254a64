"""The captured runner says what the plain loop and the eager runner say, also with two steps on their way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop import ops
from fastloop.checkpoint import Model
from fastloop.config import ConfigError
from fastloop.decision import DecisionState
from fastloop.engine import Engine
from fastloop.engine import streams as schedule
from fastloop.engine.buckets import SPARE_STREAMS
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.kv_cache import KVCache
from fastloop.engine.recorder import CaptureError
from fastloop.engine.runner import EagerRunner, StepBatch, StepResult
from fastloop.engine.stream_simulation import BlockingStreams, hazards
from fastloop.engine.streams import STATE, Streams
from fastloop.errors import FastloopError
from fastloop.events import ResponseText
from fastloop.mel import MelState
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine
from fastloop.testing.steps import MODEL, PAGE_TOKENS, PAGES, SESSIONS, random_batch

INITIAL = {*STATE, "mel state", schedule.tokens(0)}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def captured_engine(model: Model, sessions: int, streams: Streams | None = None) -> Engine:
    config = EngineConfig(max_sessions=sessions, page_tokens=16, runner="captured")
    engine = Engine(model, config)
    engine.runner = CapturedRunner(model, engine.cache, engine._decisions, engine._mel, streams)
    return engine


def some_scripts(policy: DecisionPolicy, sessions: int, seed: int) -> list[Script]:
    rng = np.random.default_rng(seed)
    return [
        Script(
            SessionConfig(
                policy=policy,
                sampling=Sampling(temperature=[0.0, 0.8][i % 2], top_k=20 * (i % 3)),
                seed=i,
                max_response_tokens=12,
                window_s=[2.0, 60.0, None][i % 3],
                edge="reflect",
            ),
            random_sound(0.4 * int(rng.integers(3, 9)), seed=100 * seed + i),
            cancel_after={0: int(rng.integers(0, 6))},
            start_step=int(rng.integers(0, 6)),
            push_samples=int(rng.integers(1500, 30_000)),
        )
        for i in range(sessions)
    ]


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), sessions=st.sampled_from([1, 4]))
def test_any_delays_of_the_streams_give_what_the_plain_loop_says(
    model: Model, policy: DecisionPolicy, seed: int, sessions: int
) -> None:
    """The whole engine over simulated streams; its schedule is proven in order, too."""
    streams = BlockingStreams(seed)
    scripts = some_scripts(policy, sessions, seed % 1000)
    engine = captured_engine(model, sessions, streams)
    for got, script in zip(run_engine(engine, scripts), scripts, strict=True):
        want = expected(model, script)
        assert comparable(got) == comparable(want)
        assert np.abs(chances(got) - chances(want)).max(initial=0) <= 1e-5
    engine.check()
    assert engine.cache.allocator.used == 0
    assert hazards(streams.log, INITIAL) == []


def test_captured_eager_and_uncaptured_say_the_same(
    model: Model, policy: DecisionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = some_scripts(policy, 6, seed=1)
    eager = run_engine(Engine(model, EngineConfig(max_sessions=6, page_tokens=16, runner="eager")), scripts)
    captured = run_engine(captured_engine(model, 6), scripts)
    monkeypatch.setenv("FASTLOOP_CAPTURE", "0")
    op_by_op = run_engine(captured_engine(model, 6), scripts)
    assert captured == op_by_op  # to the bit, p(respond) included
    assert [comparable(events) for events in captured] == [comparable(events) for events in eager]


def test_offline_clips_and_the_waiting_edge(model: Model) -> None:
    """A clip of any length is one step of as many rows; edge="wait" primes the mel state besides."""
    for config in (
        SessionConfig(mode="offline", user_text="how many?", max_response_tokens=9),
        SessionConfig(edge="wait", policy=DecisionPolicy(0.3), max_response_tokens=5),
    ):
        heard = []
        for runner in ("eager", "captured"):
            engine = Engine(model, EngineConfig(page_tokens=16, runner=runner))
            session = engine.open(config)
            session.push(random_sound(4.36, seed=1))
            session.flush()
            engine.run_until_idle()
            heard.append(comparable(session.poll()))
        assert heard[0] == heard[1] and len(heard[0]) > 2


class World:
    """A runner over a pool of its own; worlds are equal."""

    def __init__(self, model: Model, kind: type[EagerRunner]) -> None:
        self.cache = KVCache(MODEL, PAGES, PAGE_TOKENS, torch.float32, "cpu")
        generator = torch.Generator().manual_seed(1)
        for pool in (self.cache.k_pages, self.cache.v_pages):
            pool.normal_(generator=generator)
        self.decisions = DecisionState(SESSIONS + 1)
        for slot in range(SESSIONS):
            self.decisions.reset(slot, DecisionPolicy(0.45), MODEL)
        self.runner = kind(model, self.cache, self.decisions, MelState.empty(SESSIONS + 2 * SPARE_STREAMS))


def assert_same(got: StepResult, want: StepResult) -> None:
    assert (got.decisions, got.drawn) == (want.decisions, want.drawn)
    assert np.allclose(got.p_respond, want.p_respond, rtol=0, atol=1e-5)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 6))
def test_two_steps_on_their_way_are_what_one_by_one_is(model: Model, seed: int, steps: int) -> None:
    """Batches of any bucket, each submitted before the result of the one before is collected."""
    rng = np.random.default_rng(seed)
    batches = [random_batch(rng, int(rng.integers(1, 6)), int(rng.integers(0, 12))) for _ in range(steps)]
    eager, captured = World(model, EagerRunner), World(model, CapturedRunner)
    runner = captured.runner
    assert isinstance(runner, CapturedRunner)
    results = []
    for number, batch in enumerate(batches):
        runner.submit(batch)
        if number:
            results.append(runner.collect())
    results.append(runner.collect())
    for got, batch in zip(results, batches, strict=True):
        assert_same(got, eager.runner.step(batch))
    assert torch.equal(captured.decisions.state[:SESSIONS], eager.decisions.state[:SESSIONS])
    assert torch.allclose(captured.cache.k_pages, eager.cache.k_pages, atol=1e-5)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)
@pytest.mark.parametrize("sessions", [1, 3])
def test_after_a_warm_up_nothing_is_captured_any_more(model: Model, sessions: int, device: str) -> None:
    """Of sessions that listen and speak; and it leaves no trace in what they hear."""
    config = SessionConfig(policy=lively_policy(model), max_response_tokens=5, speculative_chunks=1)
    scripts = [Script(config, random_sound(1.6, seed=i), push_samples=6400) for i in range(sessions)]
    model = model.to(device)
    heard = []
    for warm in (False, True):
        engine = Engine(model, EngineConfig(max_sessions=sessions, page_tokens=64, runner="captured"))
        runner = engine.runner
        assert isinstance(runner, CapturedRunner)
        if warm:
            engine.warm_up()
            sets, perceived = set(runner._sets), runner._perceive.captured
        heard.append([comparable(events) for events in run_engine(engine, scripts)])
        if warm:
            assert set(runner._sets) == sets and runner._perceive.captured == perceived
            assert perceived == ([1], [1]) if sessions == 1 else perceived == ([1, 2, 4], [1, 2, 4])
    assert heard[0] == heard[1] and any(isinstance(e, ResponseText) for events in heard[1] for e in events)


def test_a_warm_up_in_the_middle_of_a_stream_leaves_no_trace(model: Model) -> None:
    heard = []
    for warm in (False, True):
        engine = Engine(model, EngineConfig(max_sessions=2, page_tokens=16, runner="captured"))
        session = engine.open(SessionConfig(policy=DecisionPolicy(0.45), max_response_tokens=5))
        for number, chunk in enumerate(random_sound(2.0, seed=4).reshape(5, -1)):
            session.push(chunk)
            engine.step()
            if warm and number == 2:
                engine.warm_up(2)
        engine.run_until_idle()
        heard.append(comparable(session.poll()))
    assert heard[0] == heard[1] and heard[0]


def test_a_warm_up_is_for_sessions_that_fit(model: Model) -> None:
    engine = Engine(model, EngineConfig(max_sessions=2))
    for count in (0, 3, -1, 1.0, True):
        with pytest.raises(ValueError, match=r"^Engine\.warm_up: sessions must be 1 to 2, got"):
            engine.warm_up(count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Engine\.warm_up: speakers must be 0 to 1, got 2"):
        engine.warm_up(1, 2)
    engine.warm_up(1, 0)  # by whichever runner
    engine.close()
    with pytest.raises(FastloopError, match=r"^Engine\.warm_up: the engine is draining"):
        engine.warm_up()


def test_a_warm_up_that_fails_ends_the_engine(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, EngineConfig(max_sessions=2, runner="captured"))

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.runner, "warm_up", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.warm_up()
    assert engine.health()["status"] == "failed"
    with pytest.raises(FastloopError, match=r"^Engine\.warm_up: the engine has failed: RuntimeError: no mem"):
        engine.warm_up()


def test_a_bucket_is_captured_once_for_each_turn(model: Model) -> None:
    world = World(model, CapturedRunner)
    runner = world.runner
    assert isinstance(runner, CapturedRunner)
    batches = [random_batch(np.random.default_rng(i), 1, 2) for i in range(5)]
    for batch in batches:
        runner.step(batch)
    assert len(runner.captured) == 1
    sets = dict(runner._sets)
    assert len(sets) == 2
    addresses = {key: own.buffers.inputs.data_ptr() for key, own in sets.items()}
    runner.step(batches[0])
    assert {key: own.buffers.inputs.data_ptr() for key, own in runner._sets.items()} == addresses
    assert all(runner._sets[key] is sets[key] for key in sets)


def test_order_of_submit_and_collect(model: Model) -> None:
    runner = World(model, CapturedRunner).runner
    assert isinstance(runner, CapturedRunner)
    batch = random_batch(np.random.default_rng(0), 1, 0)
    with pytest.raises(RuntimeError, match="no step is on its way"):
        runner.collect()
    runner.submit(batch)
    runner.submit(batch)
    with pytest.raises(RuntimeError, match="two steps are on their way; collect"):
        runner.submit(batch)


def test_a_mismatch_leaves_the_runner_usable(model: Model) -> None:
    eager, captured = World(model, EagerRunner), World(model, CapturedRunner)
    batch = random_batch(np.random.default_rng(0), 2, 1)
    with pytest.raises(ValueError, match=r"step: positions is \[3\], must be \["):
        captured.runner.step(replace(batch, positions=batch.positions[:3]))
    assert_same(captured.runner.step(batch), eager.runner.step(batch))


def test_an_implementation_that_cannot_be_captured_is_an_error_and_no_other_takes_its_place(
    model: Model,
) -> None:
    batch: StepBatch = random_batch(np.random.default_rng(0), 1, 1)
    with ops.use_backend("sample=reference"), pytest.raises(CaptureError, match=r"sample\[reference\]"):
        World(model, CapturedRunner).runner.step(batch)


def test_switches(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOOP_CAPTURE", "yes")
    with pytest.raises(ConfigError, match="FASTLOOP_CAPTURE: must be 0 or 1, got 'yes'"):
        Engine(model, EngineConfig(runner="captured"))
    monkeypatch.delenv("FASTLOOP_CAPTURE")
    monkeypatch.setenv("FASTLOOP_DEPENDENT", "true")
    with pytest.raises(ConfigError, match="FASTLOOP_DEPENDENT: must be 0 or 1, got 'true'"):
        Engine(model, EngineConfig(runner="captured"))
    monkeypatch.delenv("FASTLOOP_DEPENDENT")
    assert isinstance(Engine(model, EngineConfig(runner="captured")).runner, CapturedRunner)
    assert not isinstance(Engine(model).runner, CapturedRunner)
    with pytest.raises(ConfigError, match="the captured runner keeps the checkpoint's"):
        EngineConfig(runner="captured", precision="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_say_what_the_eager_runner_says(policy: DecisionPolicy) -> None:
    own = random_model(MODEL, seed=3)
    own = Model(MODEL, {name: weight.cuda() for name, weight in own.weights.items()}, own.tokenizer)
    scripts = some_scripts(policy, 6, seed=2)
    runs = [
        run_engine(Engine(own, EngineConfig(max_sessions=6, page_tokens=16, runner=runner)), scripts)
        for runner in ("eager", "captured")
    ]
    assert [comparable(events) for events in runs[0]] == [comparable(events) for events in runs[1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_kernels_that_overlap_in_a_graph_say_the_same(
    policy: DecisionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, p(respond) included; on a GPU older than sm_90 none does."""
    own = random_model(MODEL, seed=3)
    own = Model(MODEL, {name: weight.cuda() for name, weight in own.weights.items()}, own.tokenizer)
    scripts, runs = some_scripts(policy, 6, seed=2), []
    with ops.use_backend("mel=cuda,paged_attention=cuda,decide=cuda,sample=cuda"):
        for flag in ("0", "1"):
            monkeypatch.setenv("FASTLOOP_DEPENDENT", flag)
            config = EngineConfig(max_sessions=6, page_tokens=16, runner="captured")
            runs.append(run_engine(Engine(own, config), scripts))
    assert runs[0] == runs[1]
