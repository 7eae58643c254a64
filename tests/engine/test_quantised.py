"""Quantised weights op by op: the eager and the captured runner on what `fastloop convert` keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.checkpoint import Model, load, save
from fastloop.convert import convert
from fastloop.decision import DecisionState
from fastloop.engine import Engine
from fastloop.engine.buckets import SPARE_STREAMS
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.kv_cache import KVCache
from fastloop.engine.recorder import CaptureError, Tape
from fastloop.engine.runner import EagerRunner
from fastloop.events import Event
from fastloop.mel import MelState
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.quantise import QUANTISERS
from fastloop.stored import precision_of
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, comparable, lively_policy, run_engine
from fastloop.testing.steps import MODEL, PAGE_TOKENS, PAGES, SESSIONS, random_batch

PRECISIONS = ("int8", "fp8", "int4")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def kept_so(model: Model, precision: str) -> Model:
    """The model with its matrices quantised as a converted checkpoint has them; the rest as it was."""
    wanted = {name: precision_of(name, tuple(w.shape), precision) for name, w in model.weights.items()}
    matrices = {name: QUANTISERS[kept](model.weights[name]) for name, kept in wanted.items() if kept}
    floats = {name: weight for name, weight in model.weights.items() if name not in matrices}
    return Model(model.config, floats, model.tokenizer, matrices)


def whole(model: Model) -> Model:
    """The same weights as floats of the model's dtype."""
    floats = {name: matrix.dequantised().to(model.dtype) for name, matrix in model.quantised.items()}
    return Model(model.config, {**model.weights, **floats}, model.tokenizer)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, seed=3)


def scripts(model: Model) -> list[Script]:
    policy = lively_policy(model)
    sampling = (Sampling(), Sampling(temperature=0.8, top_k=20))
    return [
        Script(
            SessionConfig(
                policy=policy, sampling=sampling[i % 2], seed=i, max_response_tokens=8, window_s=2.0
            ),
            random_sound(1.6, seed=i),
            start_step=2 * i,
        )
        for i in range(3)
    ]


def heard(model: Model, runner: str, said: list[Script], **options: Any) -> list[list[Event]]:
    config = EngineConfig(max_sessions=len(said), page_tokens=16, runner=runner, **options)
    return run_engine(Engine(model, config), said)


@every_precision
def test_the_eager_runner_says_what_it_says_of_the_same_weights_as_floats(
    model: Model, precision: str
) -> None:
    """To the bit: every matrix is multiplied where it belongs, with its bias, gate and residual."""
    quantised = kept_so(model, precision)
    said = scripts(model)
    assert heard(quantised, "eager", said) == heard(whole(quantised), "eager", said)
    assert heard(quantised, "eager", said) != heard(model, "eager", said)


@every_precision
def test_a_replay_is_what_the_step_says_op_by_op(
    model: Model, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, said = kept_so(model, precision), scripts(model)
    captured = heard(quantised, "captured", said)
    eager = heard(quantised, "eager", said)
    monkeypatch.setenv("FASTLOOP_CAPTURE", "0")
    assert captured == heard(quantised, "captured", said)  # to the bit, p(respond) included
    assert [comparable(events) for events in captured] == [comparable(events) for events in eager]


class World:
    """A runner over a pool of its own; worlds are equal."""

    def __init__(self, model: Model, kind: type[EagerRunner]) -> None:
        self.cache = KVCache(MODEL, PAGES, PAGE_TOKENS, model.dtype, model.device)
        generator = torch.Generator().manual_seed(1)
        for pool in (self.cache.k_pages, self.cache.v_pages):
            pool.copy_(torch.randn(pool.shape, generator=generator))
        self.decisions = DecisionState(SESSIONS + 1, model.device)
        for slot in range(SESSIONS):
            self.decisions.reset(slot, DecisionPolicy(0.45), MODEL)
        mel = MelState.empty(SESSIONS + 2 * SPARE_STREAMS, model.device)
        self.runner = kind(model, self.cache, self.decisions, mel)


@every_precision
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 5))
def test_two_steps_on_their_way_are_what_one_by_one_is(
    model: Model, precision: str, seed: int, steps: int
) -> None:
    """Batches of any bucket: the captured step reads the quantised weights at their fixed addresses."""
    rng = np.random.default_rng(seed)
    batches = [random_batch(rng, int(rng.integers(1, 6)), int(rng.integers(0, 12))) for _ in range(steps)]
    quantised = kept_so(model, precision)
    eager, captured = World(quantised, EagerRunner), World(quantised, CapturedRunner)
    results = []
    for number, batch in enumerate(batches):
        captured.runner.submit(batch)
        if number:
            results.append(captured.runner.collect())
    results.append(captured.runner.collect())
    for got, batch in zip(results, batches, strict=True):
        want = eager.runner.step(batch)
        assert (got.decisions, got.drawn) == (want.decisions, want.drawn)
        assert np.allclose(got.p_respond, want.p_respond, rtol=0, atol=1e-5)
    assert torch.allclose(captured.cache.k_pages, eager.cache.k_pages, atol=1e-5)


def tape(runner: EagerRunner) -> Tape:
    assert isinstance(runner, CapturedRunner)
    runner.step(random_batch(np.random.default_rng(0), 1, 1))
    graph = next(iter(runner._sets.values())).graph
    assert isinstance(graph, Tape)
    return graph


@every_precision
def test_bias_gate_and_residual_are_part_of_the_product(model: Model, precision: str) -> None:
    """A step has the launches that it has with floats, four products of a layer and the head among them."""
    launches = [
        launch.name for launch in tape(World(kept_so(model, precision), CapturedRunner).runner).launches
    ]
    plain = [launch.name for launch in tape(World(model, CapturedRunner).runner).launches]
    assert [name.replace("linear_quantised", "linear") for name in launches] == plain
    assert launches.count("linear_quantised[reference]") == 4 * MODEL.decoder.layers
    assert launches.count("linear[reference]") == 1


def test_weights_that_the_step_was_not_told_of_are_not_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would make the tests above pass for the wrong reason."""
    monkeypatch.setattr(Model, "tensors", property(lambda self: [*self.weights.values()]))
    with pytest.raises(CaptureError, match=r"linear_quantised\[reference\].* neither a static buffer"):
        tape(World(kept_so(model, "int8"), CapturedRunner).runner)


def test_whole_sequences_take_floats(model: Model) -> None:
    x = torch.zeros(1, 3, MODEL.decoder.width)
    with pytest.raises(ValueError, match=r"Decoder.sequence: takes float weights; load .* with a dtype"):
        kept_so(model, "int8").decoder.sequence(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_precision
def test_cuda_graphs_say_what_the_eager_runner_says(
    model: Model, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a converted checkpoint, loaded onto the GPU as it is kept. In its bfloat16, products of padded
    rows are rounded otherwise than those of the rows alone: there the graphs are compared, to the bit, with
    the same padded steps op by op, and with the eager runner where the rest is widened to float32.
    """
    save(tmp_path / "m", model.config, model.weights, model.tokenizer.to_json())
    convert(tmp_path / "m", tmp_path / precision, dtype=precision)
    own, said = load(tmp_path / precision, device="cuda"), scripts(model)
    assert own.precision == precision and own.dtype == torch.bfloat16
    wide = replace(own, weights={name: weight.float() for name, weight in own.weights.items()})
    eager, captured = (heard(wide, runner, said) for runner in ("eager", "captured"))
    assert [comparable(events) for events in captured] == [comparable(events) for events in eager]
    captured = heard(own, "captured", said)
    monkeypatch.setenv("FASTLOOP_CAPTURE", "0")
    assert captured == heard(own, "captured", said)
