"""A reply as a program of the device: the plain loop's words, whoever interrupts; a clear refusal."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.engine import Engine, Session, conditional
from fastloop.engine import streams as schedule
from fastloop.engine.buckets import Bucket
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.graphs import Loop, loop_tape
from fastloop.engine.recorder import CaptureError, Launch
from fastloop.engine.reply import REPLY_TOKENS, Replies, ReplyBuffers, ReplyProgram, schedule_of
from fastloop.engine.stream_simulation import BlockingStreams, hazards
from fastloop.engine.streams import STATE, Streams
from fastloop.events import Event, ResponseEnd
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine
from fastloop.testing.steps import PAGE_TOKENS, random_batch

INITIAL = {*STATE, "mel state", "frames", "encoded", schedule.tokens(0)}
TALKS = SessionConfig(
    policy=DecisionPolicy(0.0, min_gap_s=3600), sampling=Sampling(1.5), seed=4, max_response_tokens=40
)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(), seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def engine_of(model: Model, streams: Streams | None = None, **limits: Any) -> Engine:
    config = EngineConfig(max_sessions=3, page_tokens=16, runner="captured", single_stream=True, **limits)
    engine = Engine(model, config)
    engine.runner = CapturedRunner(model, engine.cache, engine._decisions, engine._mel, streams)
    return engine


def check_equal(got: list[Event], want: list[Event]) -> None:
    assert comparable(got) == comparable(want)
    assert np.abs(chances(got) - chances(want)).max(initial=0) <= 1e-5


def replies(engine: Engine) -> list[int]:
    """Tokens of each loop that was begun, from now on; filled as the engine goes."""
    begun: list[int] = []
    replies = engine.runner.replies
    assert replies is not None
    submit = replies.submit

    def counted(batch: Any, limit: int) -> None:
        begun.append(limit)
        submit(batch, limit)

    replies.submit = counted  # type: ignore[method-assign]
    return begun


def during(engine: Engine, token: int, act: Callable[[], object]) -> None:
    """Do something while the device is in the loop, when it has drawn `token` tokens in all."""
    replies = engine.runner.replies
    assert replies is not None
    drawn = [0]

    def run() -> None:
        drawn[0] += 1
        if drawn[0] == token:
            act()

    make = replies._program

    def programs(bucket: Any) -> Any:
        known = bucket in replies._programs
        program, graph = make(bucket)
        if not known:
            assert isinstance(graph, Loop)
            graph.body.launches.append(Launch("host", (), (), run, (), ()))  # type: ignore[attr-defined]
        return program, graph

    replies._program = programs  # type: ignore[method-assign]


@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_loop_of_the_device_says_what_the_plain_loop_says(
    model: Model, policy: DecisionPolicy, data: st.DataObject, seed: int
) -> None:
    """Alone, any options, under any delays, in proven order."""
    temperature, top_k = data.draw(st.sampled_from([(0.0, 0), (0.8, 9), (1.5, 0)]))
    config = SessionConfig(
        policy=policy,
        sampling=Sampling(temperature, top_k),
        seed=seed,
        max_response_tokens=data.draw(st.sampled_from([1, 2, 3, 20])),
        window_s=data.draw(st.sampled_from([None, 60.0, 1.2])),
        max_events=data.draw(st.sampled_from([8, 4096])),
    )
    script = Script(
        config,
        random_sound(0.4 * data.draw(st.integers(1, 10)), seed % 100),
        cancel_after=data.draw(st.dictionaries(st.integers(0, 3), st.integers(0, 4), max_size=2)),
        push_samples=data.draw(st.integers(3000, 30_000)),
    )
    streams = BlockingStreams(seed)
    engine = engine_of(model, streams)
    # A reply ends in one call here, so only a cancel before it is one that the script can time.
    script.cancel_after = dict.fromkeys(script.cancel_after, 0)
    got = run_engine(engine, [script])[0]
    check_equal(got, expected(model, script))
    engine.check()
    assert engine.cache.allocator.used == 0 and not engine._steps.busy
    assert hazards(streams.log, INITIAL) == []


def test_one_launch_is_a_whole_reply(model: Model) -> None:
    engine = engine_of(model)
    begun = replies(engine)
    session = engine.open(TALKS)
    session.push(random_sound(0.4))
    engine.run_until_idle()
    said = session.poll()
    check_equal(said, expected(model, Script(TALKS, random_sound(0.4))))
    assert begun == [40] and isinstance(said[-1], ResponseEnd)
    assert engine.counters.steps == 2 and engine.counters.text_tokens == session.stream.spoken > 10


def test_a_long_reply_is_several_loops(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastloop.engine.steps.REPLY_TOKENS", 7)
    engine = engine_of(model)
    begun = replies(engine)
    session = engine.open(TALKS)
    session.push(random_sound(0.8))
    engine.run_until_idle()
    check_equal(session.poll(), expected(model, Script(TALKS, random_sound(0.8))))
    assert len(begun) > 2 and set(begun[:-1]) == {7}


def test_two_sessions_go_step_by_step(model: Model) -> None:
    engine = engine_of(model)
    begun = replies(engine)
    scripts = [Script(TALKS, random_sound(0.8, seed=i)) for i in range(2)]
    for got, script in zip(run_engine(engine, scripts), scripts, strict=True):
        check_equal(got, expected(model, script))
    assert begun == []


@pytest.mark.parametrize("after", [1, 3, 9])
def test_the_host_ends_the_loop_and_the_reply_goes_on(model: Model, after: int) -> None:
    """The flag counts at the next token; what the loop had taken and not used goes back."""
    engine = engine_of(model)
    begun = replies(engine)
    assert engine.runner.replies is not None
    during(engine, after, engine.runner.replies.stop)
    session = engine.open(TALKS)
    session.push(random_sound(0.8))
    while not begun:
        engine.step()
    engine.step()
    # The loop was told in the body behind its copy of the flag, so it ends with the next token.
    assert session.stream.spoken == after + 1 and session.responding
    engine.check()
    engine.run_until_idle()
    check_equal(session.poll(), expected(model, Script(TALKS, random_sound(0.8))))
    assert len(begun) == 2


def test_a_cancel_during_the_loop_is_one_before_its_first_unread_token(model: Model) -> None:
    engine = engine_of(model)
    session = engine.open(TALKS)
    during(engine, 5, session.cancel)
    session.push(random_sound(2.0))
    engine.run_until_idle()
    got = session.poll()
    want = expected(model, Script(TALKS, random_sound(2.0), cancel_after={0: 0}))
    check_equal(got, want)
    session.close()
    engine.check()
    assert engine.cache.allocator.used == 0


def test_a_session_that_is_closed_or_joined_during_the_loop(model: Model) -> None:
    for act in ("close", "join"):
        streams = BlockingStreams(3)
        engine = engine_of(model, streams)
        session = engine.open(TALKS)
        session.push(random_sound(0.4))
        while engine._steps._reply is None:
            engine.step()
        if act == "close":
            session.close()
        fresh = engine.open(TALKS)
        fresh.push(random_sound(0.4))
        engine.run_until_idle()
        want = expected(model, Script(TALKS, random_sound(0.4)))
        check_equal(fresh.poll(), want)
        if act == "join":
            check_equal(session.poll(), want)
        engine.close()
        engine.check()
        assert engine.cache.allocator.used == 0 and hazards(streams.log, INITIAL) == []


def test_a_snapshot_during_the_loop_waits_for_its_end(model: Model) -> None:
    engine = engine_of(model, BlockingStreams(1))
    session = engine.open(TALKS)
    session.push(random_sound(0.4))
    while engine._steps._reply is None:
        engine.step()
    twin = engine.restore(session.snapshot())
    assert not engine._steps.busy
    engine.run_until_idle()
    want = expected(model, Script(TALKS, random_sound(0.4)))
    check_equal(session.poll(), want)
    check_equal(twin.poll(), want)


def test_logits_that_are_not_finite_end_loop_and_session(model: Model) -> None:
    engine = engine_of(model)
    session: Session = engine.open(TALKS)

    def spoil() -> None:
        engine.cache.k_pages[:, session.stream.kv.pages] = torch.nan

    during(engine, 3, spoil)
    session.push(random_sound(0.4))
    engine.run_until_idle()
    assert session.closed and "not finite" in (session.stream.failure or "")
    assert session.stream.spoken == 3
    engine.check()
    assert engine.cache.allocator.used == 0


def test_without_pages_it_goes_step_by_step(model: Model) -> None:
    engine = engine_of(model, kv_pages=4)
    begun = replies(engine)
    config = SessionConfig(
        policy=DecisionPolicy(0.0, min_gap_s=3600),
        sampling=Sampling(1.5),
        seed=4,
        window_s=None,
        max_response_tokens=200,
    )
    session = engine.open(config)
    session.push(random_sound(0.4))
    engine.run_until_idle()
    want = comparable(expected(model, Script(config, random_sound(0.4))))
    said = comparable([e for e in session.poll() if e.type != "stalled"])
    assert begun == [] and said == want[: len(said)] and len(said) > 5
    engine.check()


@given(seed=st.integers(0, 2**31), limit=st.integers(1, 60))
def test_a_schedule_is_what_each_step_would_be_given(seed: int, limit: int) -> None:
    """Row by row: position, slot, length and counter of a sequence that grows by one token a step."""
    batch = random_batch(np.random.default_rng(seed), listeners=0, speakers=1)
    pages = np.arange(100, 100 + 20, dtype=np.int32)
    used = -(-int(batch.kv_lens[0]) // PAGE_TOKENS)
    table = np.concatenate((batch.block_table[0, :used], pages))[None]
    schedule = schedule_of(replace(batch, block_table=table), limit, PAGE_TOKENS)
    assert schedule.shape == (limit, 5)
    for i, row in enumerate(schedule):
        length = int(batch.kv_lens[0]) + 1 + i
        page, place = divmod(length - 1, PAGE_TOKENS)
        moved = [int(batch.positions[0]) + 1 + i, int(table[0, page]) * PAGE_TOKENS + place, length]
        assert row.tolist() == [*moved, int(batch.counter[0]) + 1 + i, int(i + 1 < limit)]


def test_a_limit_beyond_the_ring_is_refused(model: Model) -> None:
    engine = engine_of(model)
    runner = engine.runner
    assert isinstance(runner, CapturedRunner)
    program = ReplyProgram(runner._step, Bucket(16, 1, 16, 8), 3, ReplyBuffers.allocate(model.device))
    with pytest.raises(ValueError, match=f"limit must be between 1 and {REPLY_TOKENS}, got 257"):
        program.fill(None, 257)  # type: ignore[arg-type]


def test_a_loop_that_would_never_end_is_refused() -> None:
    number, condition = torch.zeros(1), torch.ones(1, dtype=torch.int32)
    static = {"number": number, "condition": condition}
    with pytest.raises(CaptureError, match="does not write its condition"):
        loop_tape(lambda: number.add_(1), condition, static, [])  # type: ignore[arg-type]

    def body() -> None:
        number.add_(1)
        condition.copy_(number < 5)

    loop = loop_tape(body, condition, static, [])
    number.zero_()
    loop.replay()
    assert int(number) == 5
    number.fill_(9)
    loop.replay()
    assert int(number) == 10  # at least once


def test_single_stream_is_refused_where_it_cannot_be(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="single_stream: only the captured runner"):
        Engine(model, EngineConfig(runner="eager", single_stream=True))
    monkeypatch.setattr(Replies, "refusal", "the driver serves CUDA 12.2")
    with pytest.raises(ConfigError, match=r"single_stream: the driver serves CUDA 12\.2; leave it False"):
        Engine(model, EngineConfig(runner="captured", single_stream=True))


# ---- the CUDA graph


class Driver(types.SimpleNamespace):
    """cuda.bindings.driver as `conditional` calls it: every call is written down and succeeds."""

    def __init__(self, version: int = 12_090, **changes: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        answers: dict[str, Any] = {"cuDriverGetVersion": version, "cuCtxGetCurrent": "context"}
        answers |= {"cuModuleGetFunction": "kernel", "cuModuleLoadData": "module"}
        answers |= {"cuGraphCreate": "graph", "cuGraphConditionalHandleCreate": 77}
        answers |= {"cuGraphInstantiate": "executable", "cuGraphAddNode": "node"}
        silent = ("cuStreamBeginCaptureToGraph", "cuStreamEndCapture", "cuFuncLoad", "cuLaunchKernel")
        calls = {name: self._call(name, answers.get(name)) for name in (*answers, *silent, "cuGraphLaunch")}
        enums: dict[str, Any] = {
            "CU_GRAPH_COND_ASSIGN_DEFAULT": 1,
            "CUDA_VERSION": version,
            "CUgraphNodeType": types.SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional"),
            "CUgraphConditionalNodeType": types.SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while"),
            "CUstreamCaptureMode": types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread"),
            "CUgraphNodeParams": lambda: types.SimpleNamespace(
                conditional=types.SimpleNamespace(phGraph_out=["inside"])
            ),
        }
        super().__init__(**(calls | enums | changes))

    def _call(self, name: str, answer: Any) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            return (0,) if answer is None else (0, answer)

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as far as `conditional` asks it."""
    stream = types.SimpleNamespace(cuda_stream=5, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(conditional, "_condition_image", lambda capability: b"code")


@pytest.mark.parametrize(("version", "edges"), [(12_090, ()), (13_000, (None,))])
def test_the_calls_that_make_a_while_node(
    monkeypatch: pytest.MonkeyPatch, device: None, version: int, edges: tuple[None, ...]
) -> None:
    """The body is captured into the node's graph, the condition behind it; one launch replays everything."""
    driver = Driver(version)
    monkeypatch.setattr(conditional, "bindings", lambda: driver)
    condition = torch.ones(1, dtype=torch.int32)
    graph = conditional.capture_loop(lambda: driver.calls.append(("body", ())), condition, "pool")
    assert driver.names == [
        *("cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad", "cuGraphCreate", "cuCtxGetCurrent"),
        *("cuGraphConditionalHandleCreate", "cuGraphAddNode", "cuStreamBeginCaptureToGraph", "body"),
        *("cuLaunchKernel", "cuStreamEndCapture", "cuGraphInstantiate"),
    ]
    made = dict(driver.calls)
    assert made["cuGraphConditionalHandleCreate"] == ("graph", "context", 1, 1)
    *head, params = made["cuGraphAddNode"]
    assert head == ["graph", None, *edges, 0]
    node = params.conditional
    assert (node.handle, node.type, node.size, node.ctx) == (77, "while", 1, "context")
    assert made["cuStreamBeginCaptureToGraph"][:2] == (5, "inside")
    kernel, *shape = made["cuLaunchKernel"]
    assert kernel == "kernel" and shape[:8] == [1, 1, 1, 1, 1, 1, 0, 5]
    assert shape[8][0] == (77, condition.data_ptr())
    graph.replay()
    assert driver.calls[-1] == ("cuGraphLaunch", ("executable", 5))


def test_a_capture_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, device: None) -> None:
    driver = Driver()
    monkeypatch.setattr(conditional, "bindings", lambda: driver)

    def broken() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        conditional.capture_loop(broken, torch.ones(1, dtype=torch.int32), "pool")
    assert driver.names[-1] == "cuStreamEndCapture"
    driver.cuGraphCreate = lambda flags: (2,)
    with pytest.raises(conditional.ConditionalError, match="CUDA: 2"):
        conditional.capture_loop(broken, torch.ones(1, dtype=torch.int32), "pool")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, device: None) -> None:
    gpu = torch.device("cuda", 0)
    assert "a WHILE node is a CUDA graph's, and this is cpu" in conditional.refusal(torch.device("cpu"))
    monkeypatch.setattr(conditional, "bindings", lambda: Driver(12_020))
    assert conditional.refusal(gpu) == "the driver serves CUDA 12.2, conditional nodes need 12.4"
    monkeypatch.setattr(conditional, "bindings", lambda: Driver(13_000))
    assert conditional.refusal(gpu) == ""

    def absent() -> Any:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(conditional, "bindings", absent)
    assert "cuda-bindings is not installed" in conditional.refusal(gpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_loops_say_what_the_steps_say(policy: DecisionPolicy) -> None:
    own = random_model(small(), seed=3)
    own = Model(own.config, {name: weight.cuda() for name, weight in own.weights.items()}, own.tokenizer)
    if why := conditional.refusal(own.device):
        pytest.skip(why)
    config = SessionConfig(policy=policy, sampling=Sampling(0.8), max_response_tokens=30)
    script = Script(config, random_sound(6.0, seed=1))
    runs = [
        run_engine(
            Engine(own, EngineConfig(page_tokens=16, runner="captured", single_stream=flag)), [script]
        )[0]
        for flag in (False, True)
    ]
    assert comparable(runs[0]) == comparable(runs[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_loop_counts() -> None:
    gpu = torch.device("cuda")
    if why := conditional.refusal(gpu):
        pytest.skip(why)
    number = torch.zeros(1, device=gpu)
    condition = torch.zeros(1, dtype=torch.int32, device=gpu)

    def body() -> None:
        number.add_(1)
        condition.copy_(number < 1000)

    with torch.cuda.stream(torch.cuda.Stream()):
        body()
        graph = conditional.capture_loop(body, condition, torch.cuda.MemPool())
        number.zero_()
        graph.replay()
        torch.cuda.current_stream().synchronize()
    assert int(number) == 1000
