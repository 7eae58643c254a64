"""The engine against the plain loop, token for token, and sessions against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model
from fastloop.engine import Engine
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, expected, lively_policy, run_engine

P_TOLERANCE = 1e-5  # the contract: p_respond within 1e-5, alone or in any batch


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(seed=3)


@pytest.fixture(scope="module")
def policy(model: Model) -> DecisionPolicy:
    return lively_policy(model)


def check_equal(got: list, want: list) -> None:
    assert comparable(got) == comparable(want)
    assert np.abs(chances(got) - chances(want)).max(initial=0) <= P_TOLERANCE


def random_script(draw: st.DrawFn, policy: DecisionPolicy, chunks: int, seed: int) -> Script:
    temperature = draw(st.sampled_from([0.0, 0.8]))
    config = SessionConfig(
        policy=policy,
        sampling=Sampling(temperature=temperature, top_k=draw(st.sampled_from([0, 40])), top_p=0.95),
        seed=draw(st.integers(0, 2**63 - 1)),
        max_response_tokens=draw(st.integers(1, 24)),
        window_s=draw(st.sampled_from([None, 60.0, 2.0])),
        speculative_chunks=draw(st.integers(1, 9)),
    )
    return Script(
        config,
        random_sound(0.4 * chunks, seed),
        cancel_after=draw(st.dictionaries(st.integers(0, 6), st.integers(0, 8), max_size=3)),
        start_step=draw(st.integers(0, 5)),
        push_samples=draw(st.integers(1500, 30_000)),
    )


@settings(max_examples=12)
@given(
    data=st.data(),
    sessions=st.sampled_from([1, 2, 5]),
    page=st.sampled_from([7, 16, 64]),
    runner=st.sampled_from(["auto", "auto", "captured"]),
)
def test_equals_the_plain_loop(
    model: Model, policy: DecisionPolicy, data: st.DataObject, sessions: int, page: int, runner: str
) -> None:
    scripts = [
        data.draw(st.composite(random_script)(policy, chunks=data.draw(st.integers(1, 14)), seed=i))
        for i in range(sessions)
    ]
    pages = 4000 // page * sessions
    engine = Engine(
        model, EngineConfig(max_sessions=sessions, kv_pages=pages, page_tokens=page, runner=runner)
    )
    for got, script in zip(run_engine(engine, scripts), scripts, strict=True):
        check_equal(got, expected(model, script))
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.cache.allocator.promised == 0


@pytest.mark.parametrize(
    ("sessions", "seed", "runner"),
    [(1, 0, "auto"), (2, 1, "eager"), (33, 2, "auto"), (33, 3, "eager"), (16, 3, "captured")],
)
def test_sessions_with_random_starts_pushes_and_interrupts(
    model: Model, policy: DecisionPolicy, sessions: int, seed: int, runner: str
) -> None:
    """Every eighth queues 50 chunks at once, every eighth answers at length while its sound comes in."""
    rng = np.random.default_rng(seed)
    scripts = []
    for i in range(sessions):
        long, queued = i % 8 == 7, i % 8 == 1
        config = SessionConfig(
            policy=DecisionPolicy(0.0, min_gap_s=2.0) if long else policy,
            sampling=Sampling(temperature=1.5 if long else 0.7),
            seed=i,
            max_response_tokens=80 if long else 16,
            window_s=[60.0, 4.0, None][i % 3],
        )
        script = Script(
            config,
            random_sound(20.0 if queued else 0.4 * int(rng.integers(2, 10)), seed=100 * seed + i),
            cancel_after={int(rng.integers(0, 3)): int(rng.integers(0, 10))},
            start_step=int(rng.integers(0, 20)),
            push_samples=20 * 16_000 if queued else int(rng.integers(500, 16_000)),
        )
        scripts.append(script)
    limits = EngineConfig(max_sessions=sessions, kv_pages=320 * sessions, page_tokens=16, runner=runner)
    engine = Engine(model, limits)
    results = run_engine(engine, scripts)
    for got, script in zip(results, scripts, strict=True):
        check_equal(got, expected(model, script))
    engine.check()
    assert engine.cache.allocator.used == 0 and engine.cache.allocator.promised == 0
    decisions = [e.decision for events in results for e in events if e.type == "decision"]
    assert min(decisions.count("silent"), decisions.count("respond")) > sessions // 3
    if sessions > 2:
        texts = [e.text for events in results for e in events if e.type == "response.end"]
        reasons = {e.reason for events in results for e in events if e.type == "response.end"}
        assert reasons == {"end", "length", "interrupt"} and max(map(len, texts)) > 40


@pytest.mark.parametrize("speculative", [1, 8, 64])
def test_a_queue_of_50_chunks(model: Model, policy: DecisionPolicy, speculative: int) -> None:
    config = SessionConfig(policy=policy, speculative_chunks=speculative, max_response_tokens=8)
    script = Script(config, random_sound(20.0, seed=5), push_samples=20 * 16_000)
    engine = Engine(model)
    check_equal(run_engine(engine, [script])[0], expected(model, script))


def test_speculative_silence_saves_steps(model: Model) -> None:
    silent = SessionConfig(policy=DecisionPolicy(threshold=1.0), speculative_chunks=10)
    engine = Engine(model)
    session = engine.open(silent)
    session.push(random_sound(20.0))
    engine.run_until_idle()
    assert len(session.poll()) == 50
    assert engine.counters.steps == 5


def test_long_response_while_sound_arrives(model: Model) -> None:
    """The first chunk is answered at length; the sound pushed meanwhile is decided afterwards, in order."""
    config = SessionConfig(
        policy=DecisionPolicy(threshold=0.0, min_gap_s=3600),
        max_response_tokens=40,
        sampling=Sampling(1.5),
        seed=4,
    )
    script = Script(config, random_sound(8.0, seed=2), push_samples=1600)
    engine = Engine(model)
    check_equal(run_engine(engine, [script])[0], expected(model, script))


@pytest.mark.parametrize("edge", ["reflect", "wait"])
@pytest.mark.parametrize("policy_options", [{}, {"threshold": 0.3, "rearm": 0.2}, {"min_gap_s": 1.5}])
def test_edges_and_policies(model: Model, edge: str, policy_options: dict[str, float]) -> None:
    config = SessionConfig(policy=DecisionPolicy(**policy_options), edge=edge, max_response_tokens=4)
    pcm = random_sound(4.0 + (0.0025 if edge == "wait" else 0), seed=3)
    script = Script(config, pcm, push_samples=777)
    engine = Engine(model)
    got = run_engine(engine, [script])[0]
    assert len(chances(got)) == 10
    if edge == "reflect":
        check_equal(got, expected(model, script))


def test_a_window_that_never_overflows_is_no_window(model: Model, policy: DecisionPolicy) -> None:
    pcm = random_sound(6.0, seed=8)
    runs = [
        run_engine(
            Engine(model), [Script(SessionConfig(policy=policy, window_s=w, max_response_tokens=9), pcm)]
        )[0]
        for w in (None, 60.0)
    ]
    assert runs[0] == runs[1]


def test_offline_clip_equals_the_plain_loop(model: Model) -> None:
    import torch

    from fastloop.loop import PlainLoop

    for seconds, text in ((0.04, None), (1.0, "what?"), (4.36, None), (9.1, "how many dogs?")):
        config = SessionConfig(mode="offline", user_text=text, max_response_tokens=20)
        pcm = random_sound(seconds, seed=1)
        engine = Engine(model)
        session = engine.open(config)
        session.push(pcm)
        session.flush()
        engine.run_until_idle()
        padded = np.pad(pcm, (0, -len(pcm) % 640))
        want = PlainLoop(model, config).describe(torch.from_numpy(padded))
        got = session.poll()
        assert [(e.type, getattr(e, "text", None)) for e in got] == [
            (e.type, getattr(e, "text", None)) for e in want
        ]
