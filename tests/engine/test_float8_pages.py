"""Float8 KV pages under the runners of GPUs: what they hold, that a replay reads the same, who has none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastloop.checkpoint import Model
from fastloop.config import ConfigError
from fastloop.engine import Engine
from fastloop.engine.kv_layout import RowLayout, kv_scale
from fastloop.engine.recorder import Tape
from fastloop.engine.runners import is_native
from fastloop.ops.rope_append import rotate
from fastloop.options import EngineConfig, SessionConfig
from fastloop.quantise import FP8_MOST, QUANTISERS
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, lively_policy, run_engine
from fastloop.testing.steps import MODEL

C = MODEL.decoder
KEYS = slice(C.heads * C.head_width, (C.heads + C.kv_heads) * C.head_width)  # rows of qkv
VALUES = slice((C.heads + C.kv_heads) * C.head_width, C.qkv_rows)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, seed=3)


def biased(model: Model, size: float) -> Model:
    """The model with a K bias of that size in one pair of channels of every head, and none in the others."""
    weights = dict(model.weights)
    for i in range(C.layers):
        name = f"decoder.layers.{i}.qkv.bias"
        weights[name] = weights[name].clone()
        own = weights[name][KEYS].view(C.kv_heads, 2, C.head_width // 2)
        own.zero_()
        own[..., 3] = size
    return Model(model.config, weights, model.tokenizer)


def engine(model: Model, **options: Any) -> Engine:
    given: dict[str, Any] = {"runner": "eager", "kv_precision": "fp8", "max_sessions": 4, "page_tokens": 16}
    return Engine(model, EngineConfig(**given | options))


def scripts(model: Model, silent: bool = False) -> list[Script]:
    """Streams whose windows overflow, so that prefixes are rotated."""
    policy = lively_policy(model)
    policy = replace(policy, threshold=1.0) if silent else policy
    config = SessionConfig(policy=policy, max_response_tokens=6, window_s=1.6)
    return [Script(replace(config, seed=i), random_sound(4.0, seed=i), start_step=2 * i) for i in range(3)]


@pytest.mark.parametrize("quantised", ["", "int8", "fp8"])
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_no_key_and_no_value_is_too_large(quantised: str, seed: int, size: float) -> None:
    """Whatever the rows are: also those that a row of the matrix points along, at any position."""
    g = seeded(seed)
    weights: dict[str, Any] = {
        "qkv.weight": size * torch.randn(C.qkv_rows, C.width, generator=g),
        "qkv.bias": size * torch.randn(C.qkv_rows, generator=g),
        "norm1.weight": 1 + torch.randn(C.width, generator=g),
    }
    one = replace(C, layers=1)
    floats = weights["qkv.weight"]
    if quantised:
        weights["qkv.weight"] = QUANTISERS[quantised](floats)
        floats = weights["qkv.weight"].dequantised()
    scale = kv_scale(one, {f"decoder.layers.0.{name}": weight for name, weight in weights.items()})[0]
    assert scale.shape == (2, C.kv_heads) and torch.equal(scale.log2(), scale.log2().round())
    x = torch.cat((torch.randn(8, C.width, generator=g), floats[KEYS.start :] * weights["norm1.weight"]))
    y = x / x.square().mean(1, keepdim=True).sqrt() * weights["norm1.weight"]
    made = y @ floats.T
    inv_freq = torch.rand(C.head_width // 2, generator=g)
    k = made[:, KEYS].unflatten(1, (C.kv_heads, C.head_width))
    k = rotate(k, torch.randint(1 << 20, (len(k),), generator=g), inv_freq)
    v = (made + weights["qkv.bias"])[:, VALUES].unflatten(1, (C.kv_heads, C.head_width))
    for part, own in zip((k, v), scale, strict=True):
        largest = (part / own[:, None]).abs().amax((0, 2))
        assert (largest <= FP8_MOST * (1 + 1e-5)).all() and (largest > FP8_MOST / 16).all()


@given(seed=st.integers(0, 2**32 - 1), page=st.sampled_from([1, 16]))
def test_rows_come_back(seed: int, page: int) -> None:
    """Within half a step of E4M3; once rounded, as the same bytes."""
    scale = 2.0 ** torch.randint(-6, -2, (2, 2, 3), generator=seeded(seed))
    layout = RowLayout(torch.float8_e4m3fn, scale)
    rows = torch.randn(2, 5, page, 3, 8, generator=seeded(seed + 1))
    for number, (there, back) in enumerate(
        ((layout.of_keys, layout.keys), (layout.of_values, layout.values))
    ):
        pages = there(rows)
        kept, step = back(pages), scale[:, number, None, None, :, None]
        assert pages.dtype == torch.float8_e4m3fn
        assert ((kept - rows).abs() <= rows.abs() / 16 + step * 2.0**-10).all()
        assert torch.equal(bits(there(kept)), bits(pages))


def test_they_take_a_quarter_of_float32(model: Model) -> None:
    small, large = engine(model), engine(model, kv_precision="auto")
    assert 4 * small.cache.page_bytes == large.cache.page_bytes
    plans = [e.memory_plan(4).kv_bytes_per_session for e in (small, large)]
    assert 4 * plans[0] == plans[1]
    assert small.cache.k_pages.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("precision", ["", "fp8"])
def test_captured_eager_and_uncaptured_say_the_same(
    model: Model, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float weights and with quantised ones; windows overflow, so pages are rotated between steps."""
    if precision:
        names = [name for name, w in model.weights.items() if w.dim() == 2 and ".layers." in name]
        matrices = {name: QUANTISERS[precision](model.weights[name]) for name in names}
        rest = {name: weight for name, weight in model.weights.items() if name not in matrices}
        model = Model(MODEL, rest, model.tokenizer, matrices)
    said = scripts(model)
    eager, captured = (run_engine(engine(model, runner=runner), said) for runner in ("eager", "captured"))
    assert [comparable(events) for events in captured] == [comparable(events) for events in eager]
    monkeypatch.setenv("FASTLOOP_CAPTURE", "0")
    assert captured == run_engine(engine(model, runner="captured"), said)  # to the bit


def test_a_captured_step_reads_the_scales_as_constants(model: Model) -> None:
    with engine(model, runner="captured") as own:
        session = own.open()
        session.push(random_sound(0.4))
        own.run_until_idle()
        graphs = [kept.graph for kept in own.runner._sets.values()]  # type: ignore[attr-defined]
        address = own.cache.layout.kv_scale.untyped_storage().data_ptr()  # type: ignore[union-attr]
    assert graphs and all(isinstance(graph, Tape) for graph in graphs)
    for graph in graphs:
        reading = [n.name for n in graph.launches if address in {span.start for span in n.reads}]
        assert sum("rope_append" in name for name in reading) == C.layers
        assert sum("paged_attention" in name for name in reading) == C.layers


def distance(model: Model, kv: str) -> float:
    """How far p(respond) of silent streams, whose histories stay equal, is from that of exact pages."""
    found = {
        kind: np.concatenate(
            [chances(s) for s in run_engine(engine(model, kv_precision=kind), scripts(model, True))]
        )
        for kind in ("auto", kv)
    }
    assert len(found[kv]) == 30
    return float(np.abs(found[kv] - found["auto"]).mean())


def test_a_huge_bias_of_keys_costs_nothing(model: Model) -> None:
    """100 in a pair of channels, where an E4M3 key would err by 3: p(respond) moves about as much as without
    it, though attention is much sharper. What it costs in the pages: tests/ops/test_paged_attention.py.
    """
    plain, huge = distance(biased(model, 0.0), "fp8"), distance(biased(model, 100.0), "fp8")
    assert 0 < huge <= 4 * plain


def keys_of(own: Engine, session: object) -> Tensor:
    return session.stream.kv.export()[0]  # type: ignore[attr-defined]


def test_snapshots(model: Model) -> None:
    """In the same engine and another one of its kind: to the bit. In one of exact pages, and back: keys with
    their bias there, without it here.
    """
    model = biased(model, 20.0)
    sound, config = random_sound(10.0, seed=9), scripts(model)[0].config
    source, other, exact = engine(model), engine(model, runner="captured"), engine(model, kv_precision="auto")
    session = source.open(config)
    session.push(sound[:110_000])
    source.run_until_idle()
    session.poll()
    assert session.stream.kv.start > 0, "the window never overflowed"
    data = source.snapshot(session)
    there = exact.restore(data)
    bare, whole = keys_of(source, session), keys_of(exact, there)
    start = session.stream.kv.prefix_len + session.stream.kv.start
    positions = torch.arange(start, start + bare.shape[1])
    for layer, bias in enumerate(model.decoder.key_bias()):
        turned = rotate(bias.expand(len(positions), -1, -1), positions, model.decoder.inv_freq)
        assert torch.allclose(whole[layer] - turned, bare[layer], rtol=0, atol=1e-4)
    back = source.restore(exact.snapshot(there))
    same = (keys_of(source, back) == bare).float().mean()
    assert same > 0.999  # what lies half way between two numbers may go the other way
    copies = [source.fork(session), other.restore(data)]
    told = []
    for one in (session, *copies):
        one.push(sound[110_000:])
        one._engine.run_until_idle()
        told.append(one.poll())
    assert len(chances(told[0])) >= 5
    assert comparable(told[1]) == comparable(told[0]) == comparable(told[2])
    assert np.array_equal(chances(told[1]), chances(told[0]))


def test_who_refuses_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the native runner has no fp8 pages; choose int8"):
        EngineConfig(runner="native", kv_precision="fp8")
    with pytest.raises(ConfigError, match="the captured runner keeps the checkpoint's"):
        EngineConfig(runner="captured", kv_precision="int8")
    with pytest.raises(ConfigError, match="kv_precision: fp8 pages are for GPUs"):
        engine(model, runner="auto")
    with pytest.raises(ConfigError, match="kv_precision: fp8 pages are for GPUs"):
        engine(model, runner="auto", precision="int8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    old = SimpleNamespace(device=torch.device("cuda", 0))  # all of a model that is asked here
    with pytest.raises(ConfigError, match="kv_precision: fp8 pages take sm_89 or newer, cuda:0 is sm_80"):
        is_native(EngineConfig(kv_precision="fp8"), old)  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert not is_native(EngineConfig(kv_precision="fp8"), old)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_say_what_the_eager_runner_says(model: Model) -> None:
    own = model.to("cuda")
    said = scripts(model)
    runs = [run_engine(engine(own, runner=runner), said) for runner in ("eager", "captured")]
    assert [comparable(events) for events in runs[0]] == [comparable(events) for events in runs[1]]
