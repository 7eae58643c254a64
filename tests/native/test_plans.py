"""The plans, one native call for a pass of the encoder and one for a step of the decoder, against the models
that they are compiled from, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastloop import decoder, encoder, ops
from fastloop.checkpoint import Model
from fastloop.config import ModelConfig, small
from fastloop.decoder import Decoder, StepRows
from fastloop.encoder import Encoder
from fastloop.engine.kv_layout import KVLayout, RowLayout, TileLayout, key_range
from fastloop.engine.native_runner import TILE_FORMATS, PackedModel
from fastloop.ops.native import PRECISIONS, address, native, reason
from fastloop.quantise import QUANTISERS
from fastloop.testing.assertions import bits, seeded
from fastloop.testing.cases import random_model
from fastloop.testing.tolerance import error_bound, relative_error

pytestmark = pytest.mark.skipif(native is None, reason=reason)
ISAS = native.isas().split() if native else []
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_isa = pytest.mark.parametrize("isa", ISAS)
PAGES = {
    "float32-rows": (torch.float32, False),
    "bfloat16-rows": (torch.bfloat16, False),
    "float32-tiles": (torch.float32, True),
    "bfloat16-tiles": (torch.bfloat16, True),
    "int8-tiles": (torch.int8, True),
}
every_pages = pytest.mark.parametrize("pages", PAGES)


def crooked() -> ModelConfig:
    """Dims that are no multiples of lanes and panels, but of the groups of int4."""
    config = small()
    encoder = replace(config.encoder, layers=2, width=32 * 3, heads=3, ffn=32 * 5)
    decoder = replace(config.decoder, layers=2, width=32 * 3, heads=6, kv_heads=2, head_width=32, ffn=32 * 5)
    return replace(config, encoder=encoder, decoder=decoder)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(crooked(), seed=5)


def stored(name: str, weight: Tensor, precision: str) -> Tensor:
    """The float32 weight that a packed one stands for."""
    if name.startswith("encoder") and precision == "int4":
        precision = "int8"
    if weight.dim() < 2 or name == "decoder.embed.weight" or precision == "float32":
        return weight
    if precision == "bfloat16":
        return weight.bfloat16().float()
    if weight.dim() == 2:
        return QUANTISERS[precision](weight).dequantised()
    kernel = weight.mT.reshape(len(weight), -1)
    return QUANTISERS[precision](kernel).dequantised().view(weight.mT.shape).mT


def rounded(x: Tensor, precision: str) -> Tensor:
    """What the kernels make of the rows of a product."""
    if precision == "float32":
        return x
    if precision == "bfloat16":
        return x.bfloat16().float()
    top = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (x * (127 / top)).round() * (top / 127)


PLAIN = RowLayout(torch.float32)


@dataclass
class Emulation:
    """The ops as the plan computes them, in PyTorch: rows of products rounded, all else in float32."""

    precision: str
    layout: KVLayout = PLAIN
    layers: int = 0  # appended to so far

    def linear(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return ops.linear_ref(rounded(x, self.precision), *args, **kwargs)

    def conv_stem(self, frames: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, at: Tensor) -> Tensor:
        for weight, bias, stride in ((w1, b1, 1), (w2, b2, 2)):
            rows = torch.nn.functional.pad(frames, (0, 0, 1, 1)).unfold(1, 3, stride).mT.flatten(2)
            kernel = weight.mT.reshape(len(weight), -1)
            frames = torch.nn.functional.gelu(rounded(rows, self.precision) @ kernel.T + bias)
        return frames + at[: frames.shape[1]]

    def rope_append(self, *args: Any) -> Tensor:
        """What is appended to int8 pages is rounded; of the pages of one layer, [P, Q, G, K]."""
        q = ops.rope_append_ref(*args)
        if self.layout.dtype == torch.int8:
            assert self.layout.key_range is not None
            own = replace(self.layout, key_range=self.layout.key_range[self.layers : self.layers + 1])
            for pool, there, back in ((args[5], own.of_keys, own.keys), (args[6], own.of_values, own.values)):
                pool.copy_(back(there(pool[None]))[0])
            self.layers += 1
        return q

    def paged_attention(self, q: Tensor, *args: Any) -> Tensor:
        """Where keys are not float32, queries are rounded, too."""
        halved = self.layout.dtype != torch.float32
        return ops.paged_attention_ref(q.bfloat16() if halved else q, *args).float()


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """emulate(precision, run): run() with the ops of the plan's precision."""

    def run(emulation: Emulation, body: Any) -> Any:
        with monkeypatch.context() as patch, ops.use_backend("reference"):
            for name in ("linear", "conv_stem", "rope_append", "paged_attention"):
                patch.setattr(ops, name, getattr(emulation, name))
            for module in (decoder, encoder):
                patch.setattr(module, "linear_kept", emulation.linear)
            return body()

    yield run


def weights_of(model: Model, precision: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: stored(name, w, precision).to(dtype) for name, w in model.weights.items()}


def encode(packed: PackedModel, frames: Tensor, threads: int = 1) -> Tensor:
    chunks, length, _ = frames.shape
    tokens = torch.full((chunks, length // 4, crooked().decoder.width), torch.nan)
    packed.encoder.encode(native.Team(threads), chunks, length, frames.data_ptr(), tokens.data_ptr())
    return tokens


@every_precision
@every_isa
def test_encoder(model: Model, isa: str, precision: str, emulate: Any) -> None:
    """Chunks of 40 frames, and the blocks of 200 and 12 frames of a clip."""
    packed = PackedModel(model, precision, isa)
    for chunks, length in ((3, 40), (1, 200), (2, 12)):
        frames = torch.randn(chunks, length, 128, generator=seeded(length))
        with ops.use_backend("reference"):
            truth = Encoder(model.config, weights_of(model, precision, torch.float64)).encode(frames.double())
        twin = Encoder(model.config, weights_of(model, precision, torch.float32))
        plain = emulate(Emulation(precision), lambda twin=twin, frames=frames: twin.encode(frames))
        assert relative_error(encode(packed, frames), truth) <= error_bound(plain, truth, torch.float32)


class Step:
    """Rows of three sequences over a cache with their context: a listener, a speaker, one that begins.

    The gap of the listener goes over the end of a tile; its slots go over that of a span (1,024).
    """

    rows = (13, 1, 3)
    lens = (1160, 134, 3)
    gaps = ((49, 66), (0, 0), (0, 0))

    def __init__(self, model: Model, pages: str, page: int | None = None) -> None:
        g, c = seeded(7), model.config.decoder
        dtype, tiled = PAGES[pages]
        self.page = page or (64 if tiled else 8)
        ranges = key_range(c, model.weights) if dtype == torch.int8 else None
        self.layout = TileLayout(dtype, c.head_width, ranges) if tiled else RowLayout(dtype)
        counts = [-(-n // self.page) for n in self.lens]
        owned = torch.randperm(sum(counts) + 2, generator=seeded(8)).int()
        self.table = torch.full((3, max(counts)), -1, dtype=torch.int32)
        slots, positions, at = [], [], 0
        shape = (c.layers, len(owned), self.page, c.kv_heads, c.head_width)
        k, v = (torch.full(shape, torch.nan) for _ in range(2))
        for b, (count, length) in enumerate(zip(counts, self.lens, strict=True)):
            self.table[b, :count] = owned[at : at + count]
            at += count
            slot = torch.arange(length)
            places = self.table[b][slot // self.page].long() * self.page + slot % self.page
            old = (slot < length - self.rows[b]) & ~((slot >= self.gaps[b][0]) & (slot < self.gaps[b][1]))
            for pool in (k, v):
                fresh = torch.randn(c.layers, int(old.sum()), *shape[3:], generator=g)
                pool.flatten(1, 2)[:, places[old]] = fresh
            slots.append(places[length - self.rows[b] :])
            positions.append(100_000 * b + slot[length - self.rows[b] :])
        self.k, self.v = self.layout.of_keys(k), self.layout.of_values(v)
        self.slots, self.positions = torch.cat(slots), torch.cat(positions)
        self.starts = torch.tensor([0, 13, 14, 17], dtype=torch.int32)
        self.kv_lens, self.gap = (torch.tensor(x, dtype=torch.int32) for x in (self.lens, self.gaps))
        self.x = torch.randn(17, c.width, generator=g)
        self.drawn = torch.tensor([13, 16])

    def only(self, b: int) -> Step:
        """The step of one sequence alone; the cache is shared."""
        one = object.__new__(Step)
        first, last = (int(self.starts[i]) for i in (b, b + 1))
        one.table, one.kv_lens, one.gap = (
            t[b : b + 1].contiguous() for t in (self.table, self.kv_lens, self.gap)
        )
        one.slots, one.positions, one.x = (
            t[first:last].clone() for t in (self.slots, self.positions, self.x)
        )
        one.starts = torch.tensor([0, last - first], dtype=torch.int32)
        one.k, one.v, one.drawn = self.k, self.v, torch.tensor([last - first - 1])
        one.page, one.layout = self.page, self.layout
        return one

    def in_torch(self, model: Model, weights: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """hidden [N, D], logits [2, V], and the keys and values that are left."""
        twin = Decoder(model.config, weights)
        k, v = self.layout.keys(self.k), self.layout.values(self.v)
        wide = torch.float64 if dtype == torch.float64 else k.dtype
        k, v = k.to(wide, copy=True), v.to(wide, copy=True)
        rows = StepRows(self.positions, self.slots, self.starts, self.table, self.kv_lens, self.gap)
        hidden = twin.forward(self.x.to(dtype), rows, k, v)
        return [hidden, twin.logits(hidden[self.drawn]), k, v]

    def in_native(self, packed: PackedModel, threads: int = 1) -> list[Tensor]:
        hidden, k, v = self.x.clone(), self.k.clone(), self.v.clone()
        logits = torch.full((len(self.drawn), crooked().decoder.vocab_padded), torch.nan)
        packed.decoder.decode(
            team=native.Team(threads),
            rows=len(hidden),
            sequences=len(self.kv_lens),
            x=hidden.data_ptr(),
            positions=self.positions.data_ptr(),
            slots=self.slots.data_ptr(),
            row_starts=self.starts.data_ptr(),
            block_table=self.table.data_ptr(),
            table_width=self.table.shape[1],
            kv_lens=self.kv_lens.data_ptr(),
            gaps=self.gap.data_ptr(),
            page_format=TILE_FORMATS[k.dtype],
            k_pages=k.data_ptr(),
            v_pages=v.data_ptr(),
            pages=k.shape[1],
            page_tokens=self.page,
            logit_rows=len(self.drawn),
            logit_row=self.drawn.data_ptr(),
            logits=logits.data_ptr(),
            page_layout=int(self.layout.tiled),
            key_range=address(self.layout.key_range),
        )
        return [hidden, logits, self.layout.keys(k), self.layout.values(v)]


@every_precision
@every_isa
@every_pages
def test_decoder(model: Model, isa: str, precision: str, pages: str, emulate: Any) -> None:
    """Hidden rows, logits, and what is in the pages; slots of nobody are NaN, and stay it."""
    step = Step(model, pages)
    with ops.use_backend("reference"):
        truths = step.in_torch(model, weights_of(model, precision, torch.float64), torch.float64)
    weights = weights_of(model, precision, torch.float32)
    emulation = Emulation(precision, step.layout)
    plains = emulate(emulation, lambda: step.in_torch(model, weights, torch.float32))
    outs = step.in_native(PackedModel(model, precision, isa))
    for out, plain, truth in zip(outs, plains, truths, strict=True):
        assert torch.equal(out.isnan(), truth.isnan())
        out, plain, truth = (t.double().nan_to_num(0.0) for t in (out, plain, truth))
        rounding = torch.float32 if step.layout.dtype == torch.float32 else torch.bfloat16
        assert relative_error(out, truth) <= error_bound(plain, truth, rounding)


@every_precision
@every_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_are_rows_in_another_order(model: Model, isa: str, precision: str, dtype: str) -> None:
    """To the bit; and where pages end changes nothing."""
    packed = PackedModel(model, precision, isa)
    rows, tiles = (Step(model, f"{dtype}-{kind}", 64).in_native(packed) for kind in ("rows", "tiles"))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(rows, tiles, strict=True))
    small, large = Step(model, f"{dtype}-rows").in_native(packed), Step(model, f"{dtype}-tiles", 128)
    for other in (small, large.in_native(packed)):
        assert torch.equal(other[0], rows[0]) and torch.equal(other[1], rows[1])


@every_precision
@every_isa
@pytest.mark.parametrize("pages", ["bfloat16-rows", "bfloat16-tiles", "int8-tiles"])
def test_a_sequence_is_the_same_alone_and_among_others(
    model: Model, isa: str, precision: str, pages: str
) -> None:
    """To the bit: hidden rows, logits, keys and values. So is a chunk in the encoder."""
    packed = PackedModel(model, precision, isa)
    step = Step(model, pages)
    hidden, logits, k, v = step.in_native(packed)
    for b in range(3):
        one = step.only(b)
        alone = one.in_native(packed)
        assert torch.equal(alone[0], hidden[int(step.starts[b]) : int(step.starts[b + 1])])
        if b > 0:
            assert torch.equal(alone[1][0], logits[b - 1])
        for ours, theirs in ((alone[2], k), (alone[3], v)):
            assert torch.equal(
                bits(ours.flatten(1, 2)[:, one.slots]), bits(theirs.flatten(1, 2)[:, one.slots])
            )
    frames = torch.randn(5, 40, 128, generator=seeded(1))
    tokens = encode(packed, frames)
    for chunk in range(5):
        assert torch.equal(encode(packed, frames[chunk : chunk + 1])[0], tokens[chunk])


@every_precision
@pytest.mark.parametrize("pages", ["bfloat16-rows", "bfloat16-tiles", "int8-tiles"])
def test_threads_and_repeats_change_nothing(model: Model, precision: str, pages: str) -> None:
    packed, step = PackedModel(model, precision), Step(model, pages)
    frames = torch.randn(5, 40, 128, generator=seeded(1))
    made = [
        [*step.in_native(packed, threads), encode(packed, frames, threads)] for threads in (1, 2, 3, 3, 1)
    ]
    for other in made[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(made[0], other, strict=True))


@every_precision
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("pages", ["bfloat16-rows", "bfloat16-tiles", "int8-tiles"])
def test_what_is_not_finite_stays_in_its_session(
    model: Model, precision: str, poison: float, pages: str
) -> None:
    packed, step = PackedModel(model, precision), Step(model, pages)
    clean = step.in_native(packed)
    step.x[13] = poison  # the speaker's only row
    dirty = step.in_native(packed)
    others = torch.arange(17) != 13
    assert torch.equal(dirty[0][others], clean[0][others]) and torch.equal(dirty[1][1], clean[1][1])
    assert not dirty[0][13].isfinite().any() and not dirty[1][0].isfinite().any()
    frames = torch.randn(3, 40, 128, generator=seeded(1))
    tokens = encode(packed, frames)
    frames[1, 17, 5] = poison
    spoilt = encode(packed, frames)
    assert torch.equal(spoilt[::2], tokens[::2]) and not spoilt[1].isfinite().any()


def test_a_step_that_cannot_be_says_why_and_changes_nothing(model: Model) -> None:
    packed, step = PackedModel(model, "float32"), Step(model, "float32-rows")
    for name, place, value, told in (
        ("slots", 4, 10_000, "decoder: slot of row 4 is 10000"),
        ("table", (0, 1), 999, "decoder: block_table holds 999 as page 1 of sequence 0"),
        ("kv_lens", 1, 0, "decoder: sequence 1 has rows"),
        ("gap", (0, 1), 1150, r"decoder: the gap \[49, 1150\) of sequence 0"),
        ("starts", 3, 16, "decoder: row_starts must go from 0 to the 17 rows"),
        ("drawn", 1, 17, "decoder: logit_row 1 is 17, there are 17 rows"),
    ):
        spoilt = Step(model, "float32-rows")
        getattr(spoilt, name)[place] = value
        before = spoilt.k.clone()
        with pytest.raises(ValueError, match=told):
            spoilt.in_native(packed)
        assert torch.equal(bits(spoilt.k), bits(before))
    with pytest.raises(ValueError, match="encoder: 6 frames a chunk; choose a multiple of 4 up to 200"):
        encode(packed, torch.zeros(1, 6, 128))
    assert step.in_native(packed)[0].isfinite().all()


def test_a_model_without_a_part_is_refused() -> None:
    with pytest.raises(KeyError, match="the native model needs bins"):
        native.Encoder({}, [])
    with pytest.raises(KeyError, match="the native model needs width"):
        native.Decoder({}, [])
