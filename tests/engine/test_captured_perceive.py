"""Captured perception: what the eager runner hears, in proven order; padding leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastloop import ops
from fastloop.checkpoint import Model
from fastloop.decision import DecisionState
from fastloop.engine import streams as schedule
from fastloop.engine.buckets import MOST_CHUNKS, SPARE_STREAMS
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.kv_cache import KVCache
from fastloop.engine.runner import EagerRunner, Round
from fastloop.engine.stream_simulation import BlockingStreams, Entry, hazards
from fastloop.engine.streams import STATE, Streams
from fastloop.mel import MelState
from fastloop.testing.cases import random_model
from fastloop.testing.steps import MODEL

SLOTS = 70  # streams of the sessions
INITIAL = {*STATE, "mel state", "frames", "encoded", schedule.tokens(0)}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, seed=3)


def mel_state(waits: list[int]) -> MelState:
    state = MelState.empty(SLOTS + 2 * SPARE_STREAMS)
    for slot in waits:
        state.prime(slot, torch.zeros(40))
    return state


def captured(model: Model, mel: MelState, streams: Streams | None = None) -> CapturedRunner:
    cache = KVCache(MODEL, 1, 16, torch.float32, "cpu")
    return CapturedRunner(model, cache, DecisionState(1), mel, streams)


def eager(model: Model, mel: MelState) -> EagerRunner:
    return EagerRunner(model, KVCache(MODEL, 1, 16, torch.float32, "cpu"), DecisionState(1), mel)


def random_rounds(rng: np.random.Generator, rounds: int, streams: int) -> list[list[Round]]:
    """Calls of some rounds each, of any streams; the odd slots wait for their lookahead."""
    calls = []
    for _ in range(int(rng.integers(1, 4))):
        call = []
        for _ in range(int(rng.integers(1, rounds + 1))):
            for first, edge in enumerate(("reflect", "wait")):
                mine = rng.permutation(np.arange(first, SLOTS, 2))[: int(rng.integers(0, streams + 1))]
                if len(mine):
                    pcm = rng.normal(0, 0.1, (len(mine), MODEL.chunk_samples)).astype(np.float32)
                    call.append(Round(pcm, mine.tolist(), edge))
        if call:
            calls.append(call)
    return calls


def sessions(state: MelState) -> Iterator[Tensor]:
    for name in ("tail", "peak", "seen"):
        yield getattr(state, name)[:SLOTS]


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), rounds=st.integers(1, 5), streams=st.sampled_from([1, 3, 12]))
def test_any_rounds_give_what_the_eager_runner_gives(
    model: Model, seed: int, rounds: int, streams: int
) -> None:
    """Tokens within rounding, the state of every stream to the bit, under any delays and in proven order."""
    calls = random_rounds(np.random.default_rng(seed), rounds, streams)
    simulated = BlockingStreams(seed)
    odd = list(range(1, SLOTS, 2))
    ours, theirs = mel_state(odd), mel_state(odd)
    runner, plain = captured(model, ours, simulated), eager(model, theirs)
    kept = [(runner.perceive(call), plain.perceive(call)) for call in calls]
    for got, want in kept:  # read late: a later call must not have overwritten them
        assert got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(sessions(ours), sessions(theirs), strict=True))
    assert hazards(simulated.log, INITIAL) == []


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), streams=st.sampled_from([1, 5, 20]))
def test_a_replay_is_what_op_by_op_gives_to_the_bit(model: Model, seed: int, streams: int) -> None:
    calls = random_rounds(np.random.default_rng(seed), 2, streams)
    odd = list(range(1, SLOTS, 2))
    heard = []
    for flag in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTLOOP_CAPTURE", flag)
            runner = captured(model, mel_state(odd))
        heard.append([runner.perceive(call) for call in calls])
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


def test_more_chunks_than_a_pass_of_the_encoder_holds(model: Model) -> None:
    """Rounds that straddle two passes are cut; chunks keep their order."""
    rng = np.random.default_rng(0)
    slots = list(range(0, SLOTS, 2))  # 35 streams, three rounds: 105 chunks
    rounds = [
        Round(rng.normal(0, 0.1, (len(slots), MODEL.chunk_samples)).astype(np.float32), slots, "reflect")
        for _ in range(3)
    ]
    ours, theirs = mel_state([]), mel_state([])
    runner = captured(model, ours)
    got, want = runner.perceive(rounds), eager(model, theirs).perceive(rounds)
    assert len(got) == 105 > MOST_CHUNKS
    assert torch.allclose(got, want, rtol=0, atol=1e-5)
    assert runner._perceive.captured == ([8, 32, 64], [64])
    assert all(torch.equal(a, b) for a, b in zip(sessions(ours), sessions(theirs), strict=True))


def test_capturing_touches_no_stream_of_a_session(model: Model) -> None:
    state = mel_state([])
    before = [part.clone() for part in sessions(state)]
    runner = captured(model, state)
    for streams in (1, 2, 64):
        for turn in (0, 1):
            for edge in ("reflect", "wait"):
                runner._perceive._ear(streams, turn, edge, MODEL.chunk_samples)
    assert all(torch.equal(a, b) for a, b in zip(before, sessions(state), strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_implementation_on_the_cpu_can_be_captured(model: Model, backend: str) -> None:
    if backend not in ops.REGISTRY["mel"].implementations:
        pytest.skip("the native layer is not built")
    pcm = np.random.default_rng(1).normal(0, 0.1, (3, MODEL.chunk_samples)).astype(np.float32)
    with ops.use_backend(f"mel={backend}"):
        runner, plain = captured(model, mel_state([])), eager(model, mel_state([]))
        for _ in range(3):
            rounds = [Round(pcm, [4, 0, 2], "reflect")]
            assert torch.allclose(runner.perceive(rounds), plain.perceive(rounds), rtol=0, atol=1e-5)


def test_perception_overlaps_with_steps_and_not_with_itself(model: Model) -> None:
    """Sound of one round goes up while the round before it is heard: there are two buffers of it."""
    streams = BlockingStreams(0)
    runner = captured(model, mel_state([]), streams)
    for i in range(4):
        pcm = np.full((1, MODEL.chunk_samples), i / 8, np.float32)
        runner.perceive([Round(pcm, [0], "reflect")])
    log = streams.log
    assert hazards(log, INITIAL) == []
    uploads = [e for e in log if e.name == "upload pcm"]
    assert [e.writes for e in uploads] == [("pcm 0",), ("pcm 1",)] * 2
    single = [
        Entry(e.call, e.agent, e.name, tuple(_one(b) for b in e.reads), tuple(_one(b) for b in e.writes))
        for e in log
    ]
    assert hazards(single, INITIAL), "one buffer in place of two must be caught"


def _one(buffer: str) -> str:
    return buffer.rstrip("01") if buffer.startswith("pcm") else buffer


def test_a_mel_state_without_spare_streams_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match=r"the mel state has 40 slots; 128 are spare"):
        captured(model, MelState.empty(40))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_hear_what_the_eager_runner_hears() -> None:
    own = random_model(MODEL, seed=3)
    own = Model(MODEL, {name: weight.cuda() for name, weight in own.weights.items()}, own.tokenizer)
    states = [MelState.empty(SLOTS + 2 * SPARE_STREAMS, "cuda") for _ in range(2)]
    cache = KVCache(MODEL, 1, 16, torch.float32, "cuda")
    runner = CapturedRunner(own, cache, DecisionState(1, "cuda"), states[0])
    plain = EagerRunner(own, cache, DecisionState(1, "cuda"), states[1])
    for call in random_rounds(np.random.default_rng(0), 3, 12):
        rounds = [r for r in call if r.edge == "reflect"]
        if rounds:
            got, want = runner.perceive(rounds), plain.perceive(rounds)
            torch.cuda.synchronize()
            assert torch.allclose(got, want, rtol=0, atol=1e-4)
