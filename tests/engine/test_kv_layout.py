"""Tiles hold what rows hold: exactly, or as bytes that come back as the same bytes; engines that use them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.engine import Engine
from fastloop.engine.kv_layout import LARGE, RowLayout, TileLayout, key_range, quantise_rows
from fastloop.ops.native import native, reason
from fastloop.options import EngineConfig, SessionConfig
from fastloop.quantise import QUANTISERS
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, chances, comparable, lively_policy, run_engine
from fastloop.testing.tolerance import relative_error

needs_native = pytest.mark.skipif(native is None, reason=reason)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
CONFIG = small()
TILED = replace(CONFIG, decoder=replace(CONFIG.decoder, head_width=32))


def rows(seed: int, page: int = 64, head_width: int = 32) -> Tensor:
    """[L, n, Q, G, K]"""
    return torch.randn(2, 3, page, 2, head_width, generator=seeded(seed))


@every_dtype
@given(seed=st.integers(0, 2**32 - 1), page=st.sampled_from([64, 192]), width=st.sampled_from([32, 96]))
def test_rows_come_back(dtype: torch.dtype, seed: int, page: int, width: int) -> None:
    """Floats are exact. Bytes err by half a step of 1/127 of the row's largest number, and by the rounding of
    the step to 8 bits; once rounded they come back as they were.
    """
    ranges = 2.0 ** torch.randint(-4, 1, (2, 2, width), generator=seeded(seed))
    layout = TileLayout(dtype, width, ranges if dtype == torch.int8 else None)
    plain = rows(seed, page, width)
    keys, values = (layout.of_keys, layout.keys, True), (layout.of_values, layout.values, False)
    for there, back, scaled in (keys, values):
        pages = there(plain)
        kept = back(pages)
        assert pages.shape == (2, 3, 2, page // 64, 64 * (width + 4 * (dtype == torch.int8)))
        assert torch.equal(bits(there(kept)), bits(pages)) and torch.equal(back(there(kept)), kept)
        if dtype != torch.int8:
            assert torch.equal(kept, plain.to(dtype))
            continue
        step = ranges[:, None, None] if scaled else torch.ones(())
        top = (plain / step).abs().amax(-1, keepdim=True)
        assert ((kept - plain).abs() <= (0.5 + 2**-8) * step * top / 127 * (1 + 2**-8)).all()


def test_a_row_that_is_not_finite_is_nan_alone() -> None:
    plain = rows(1)
    for poison in (torch.nan, torch.inf):
        dirty = plain.clone()
        dirty[1, 2, 63, 1, 5] = poison
        layout = TileLayout(torch.int8, 32)
        kept, clean = layout.values(layout.of_values(dirty)), layout.values(layout.of_values(plain))
        assert kept[1, 2, 63, 1].isnan().all()
        kept[1, 2, 63, 1] = clean[1, 2, 63, 1]
        assert torch.equal(kept, clean)
    whole, scale = quantise_rows(torch.zeros(2, 32))
    assert not whole.any() and not scale.any()


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(x, 16) for x in line.split()[0].split("-"))
            inside = first <= address < last
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(hex(address))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here"
)
def test_large_pools_ask_for_huge_pages() -> None:
    layout = TileLayout(torch.bfloat16, 32)
    pool = layout.pool(TILED.decoder, 1024, 64, "cpu")
    assert pool.nbytes > LARGE and not pool.any()
    assert "hg" in flags_of(pool.data_ptr() + pool.nbytes // 2)


@pytest.mark.parametrize("quantised", ["", "int8", "int4"])
def test_a_huge_key_bias_costs_the_other_channels_nothing(quantised: str) -> None:
    """A bias of 300 in two pairs of channels that rotate together: scores err as much as without it, where
    one range for all would make them err twenty times as much.
    """
    model = random_model(TILED, seed=1)
    c, weights = TILED.decoder, dict(model.weights)
    own = slice(c.heads * c.head_width, (c.heads + c.kv_heads) * c.head_width)
    bias = torch.zeros(c.kv_heads, c.head_width)
    bias[:, [3, 7, 3 + c.head_width // 2, 7 + c.head_width // 2]] = 300.0
    for i in range(c.layers):
        weights[f"decoder.layers.{i}.qkv.bias"] = weights[f"decoder.layers.{i}.qkv.bias"].clone()
        weights[f"decoder.layers.{i}.qkv.bias"][own] = bias.flatten()
        if quantised:
            name = f"decoder.layers.{i}.qkv.weight"
            weights[name] = QUANTISERS[quantised](weights[name])
    ranges = key_range(c, weights)
    assert torch.equal(ranges.log2(), ranges.log2().round()) and float(ranges.max()) == 1.0
    noise = rows(2)

    def error(keys: Tensor, ranges: Tensor) -> float:
        """Of the scores of queries that are blind to the bias: what the other channels say."""
        layout = TileLayout(torch.int8, 32, ranges)
        kept = layout.keys(layout.of_keys(keys))
        q = torch.randn(32, generator=seeded(3)) * (bias[0] == 0)
        return relative_error(kept @ q, keys @ q)

    plain, one = error(noise, torch.ones(2, 2, 32)), error(noise + bias, torch.ones(2, 2, 32))
    assert error(noise + bias, ranges) <= 2 * plain and one > 20 * plain


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(TILED, seed=3)


def scripts(model: Model, count: int, seconds: float = 6.0) -> list[Script]:
    """Streams whose windows of 1.6 s overflow, so that prefixes are rotated."""
    config = SessionConfig(policy=lively_policy(model), max_response_tokens=6, window_s=1.6)
    return [
        Script(replace(config, seed=i), random_sound(seconds + 0.4 * (i % 3), seed=i), start_step=i % 4)
        for i in range(count)
    ]


def engine(model: Model, **options: object) -> Engine:
    return Engine(model, EngineConfig(max_sessions=8, **options))


KINDS = [
    {"precision": "float32"},
    {"precision": "bfloat16"},
    {"precision": "int8", "kv_precision": "float32"},
    {"precision": "int8", "kv_precision": "int8"},
    {"precision": "float32", "kv_precision": "int8"},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[str(list(kind.values())) for kind in KINDS])


@needs_native
@every_kind
def test_a_session_is_the_same_alone_and_among_others(model: Model, kind: dict[str, str]) -> None:
    streams = scripts(model, 6)
    together = run_engine(engine(model, **kind), streams)
    assert sum(e.type == "response.end" for stream in together for e in stream) > 3
    for i in (0, 3, 5):
        (alone,) = run_engine(engine(model, **kind), [streams[i]])
        assert comparable(alone) == comparable(together[i])
        assert np.array_equal(chances(alone), chances(together[i]))


@needs_native
def test_bytes_say_nearly_what_floats_say(model: Model) -> None:
    """p(respond) of silent streams, whose histories stay equal; the weights are the same."""
    config = SessionConfig(policy=replace(lively_policy(model), threshold=1.0), window_s=1.6)
    streams = [Script(config, random_sound(6.0, seed=i)) for i in range(3)]
    ran = {
        kv: run_engine(engine(model, precision="float32", kv_precision=kv), streams)
        for kv in ("float32", "bfloat16", "int8")
    }
    exact, half, byte = (np.concatenate([chances(s) for s in ran[kv]]) for kv in ran)
    assert len(exact) == 45
    assert 0 < np.abs(byte - exact).max() <= 4 * np.abs(half - exact).max()


@needs_native
@every_kind
def test_snapshots_go_on_to_the_bit(model: Model, kind: dict[str, str]) -> None:
    """In the same engine, and in another one with the same pages; behind dropped units, too."""
    sound = random_sound(10.0, seed=9)
    config = scripts(model, 1)[0].config
    source, other = engine(model, **kind), engine(model, **kind)
    session = source.open(config)
    session.push(sound[:110_000])
    source.run_until_idle()
    session.poll()
    assert session.stream.kv.start > 0, "the window never overflowed"
    copies = [source.fork(session), other.restore(source.snapshot(session))]
    told = []
    for one in (session, *copies):
        one.push(sound[110_000:])
        one._engine.run_until_idle()
        told.append(one.poll())
    assert len(chances(told[0])) > 5
    for copy in told[1:]:
        assert comparable(copy) == comparable(told[0]) and np.array_equal(chances(copy), chances(told[0]))


@needs_native
def test_which_layout(model: Model) -> None:
    for options, kind, dtype in (
        ({}, TileLayout, torch.float32),
        ({"page_tokens": 16}, RowLayout, torch.float32),
        ({"runner": "eager"}, RowLayout, torch.float32),
        ({"precision": "int8"}, TileLayout, torch.bfloat16),
        ({"kv_precision": "int8"}, TileLayout, torch.int8),
        ({"kv_precision": "bfloat16", "page_tokens": 128}, TileLayout, torch.bfloat16),
    ):
        made = engine(model, **options)
        assert type(made.cache.layout) is kind and made.cache.k_pages.dtype == dtype
    whole, half = (engine(model, kv_precision=kv).cache.page_bytes for kv in ("bfloat16", "int8"))
    assert half / whole == (32 + 4) / 64
    plan = partial(Engine.memory_plan, sessions=2)
    assert plan(engine(model, kv_precision="int8")).kv_bytes_per_session % half == 0


def test_what_cannot_be(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"EngineConfig.kv_precision: .*'int4'"):
        EngineConfig(kv_precision="int4")
    with pytest.raises(ConfigError, match="kv_precision: the eager runner keeps the checkpoint's"):
        EngineConfig(kv_precision="int8", runner="eager")
    if native is not None:
        with pytest.raises(ConfigError, match=r"int8 takes page_tokens in multiples of 64.* got 16 and 32"):
            engine(model, kv_precision="int8", page_tokens=16)
        with pytest.raises(ConfigError, match="multiples of 32 channels, got 64 and 16"):
            engine(random_model(seed=3), kv_precision="int8")
