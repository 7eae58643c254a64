"""What the native CPU engine takes, beside what this machine can do at most: `fastloop bench cpu`.

Every figure stands beside its floor, the longer of two times: its operations at the measured arithmetic peak
of its format, and its bytes at the measured read bandwidth. Both ceilings are measured before and after each
figure, in the same process, since machines are shared; the share is floor / median time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Model
from ..config import MEL_BINS, DecoderConfig, EncoderConfig, ModelConfig, published_3b, small
from ..decoder import decoder_shapes
from ..encoder import encoder_shapes
from ..engine.kv_layout import TileLayout, slot_bytes
from ..engine.native_runner import KV_DTYPES, TILE_FORMATS, PackedModel
from ..mel import MelState, mel_chunk
from ..ops.native import address, require_native
from ..quantise import GROUPS, Quantised
from .cases import byte_tokenizer

PAGE = 64  # tokens
CEILINGS = ("float32", "bfloat16", "int8", "read")
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}  # without scales
SECONDS = 2.0  # for each figure; three calls at least


def nano() -> ModelConfig:
    """Dims of a small model with heads of 64: 7 M parameters."""
    return dataclasses.replace(
        small(vocab=1024, name="nano"),
        encoder=EncoderConfig(layers=4, width=256, heads=4, ffn=1024),
        decoder=DecoderConfig(
            layers=4, width=256, heads=4, kv_heads=2, head_width=64, ffn=768, vocab=1024, vocab_padded=1024
        ),
    )


def third() -> ModelConfig:
    """The published dims with a third of the decoder's layers and vocabulary: where memory is short."""
    whole = published_3b()
    vocab = whole.decoder.vocab_padded // 3
    decoder = dataclasses.replace(
        whole.decoder, layers=whole.decoder.layers // 3, vocab=vocab, vocab_padded=vocab
    )
    return dataclasses.replace(small(vocab=vocab), name="3b-third", encoder=whole.encoder, decoder=decoder)


MARKERS = ("o", "s", "^")  # of the roofline: ten colours each
SIZES: dict[str, Callable[[], ModelConfig]] = {"nano": nano, "3b": published_3b, "3b-third": third}


class RandomWeights(Mapping[str, Any]):
    """Weights made when they are asked for, so that a 3B model never stands in memory twice.

    Matrices of the layers come quantised where the precision is int8 or int4, the rest in bfloat16.
    """

    def __init__(self, config: ModelConfig, precision: str, group: int = GROUPS[0]) -> None:
        self.shapes = encoder_shapes(config) | decoder_shapes(config)
        self.precision, self.group = precision, group
        self._tile = torch.randn(1 << 20).bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Any:
        shape = self.shapes[name]
        if len(shape) == 2 and ".layers." in name and self.precision in ("int8", "int4"):
            return self._quantised(shape, "int8" if name.startswith("encoder.") else self.precision)
        if len(shape) == 1:
            return torch.ones(shape) if "norm" in name else torch.zeros(shape)
        count = math.prod(shape)
        tile = self._tile * math.prod(shape[1:]) ** -0.5
        return tile.repeat(-(-count // len(tile)))[:count].view(shape)

    def _quantised(self, shape: tuple[int, ...], precision: str) -> Quantised:
        outputs, inputs = shape
        gain = inputs**-0.5
        if precision == "int8":
            values = torch.randint(-127, 128, shape, dtype=torch.int8)
            return Quantised(values, torch.full((outputs,), gain / 73))
        values = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        scale = torch.full((outputs, inputs // self.group), gain / 4.6).bfloat16()
        return Quantised(values, scale, self.group)


@dataclass(frozen=True)
class Figure:
    """One measured call. Times in ms; operations count a product and a sum as two; share = floor / median."""

    name: str
    size: str
    precision: str
    sessions: int
    context: int
    median_ms: float
    p99_ms: float
    minimum_ms: float
    calls: int
    operations: float
    bytes: float
    floor_ms: float
    share: float
    bound: str  # "arithmetic" or "read"
    ceilings: dict[str, float]

    @property
    def of_peak(self) -> float:
        """Share of the arithmetic peak alone."""
        return self.operations / (self.median_ms / 1e3) / self.ceilings[_peak_of(self.precision)]

    @property
    def of_read(self) -> float:
        """Share of the read bandwidth alone."""
        return self.bytes / (self.median_ms / 1e3) / self.ceilings["read"]


def _peak_of(precision: str) -> str:
    return "int8" if precision == "int4" else precision


class CpuBench:
    """A random model of one size and precision, and the calls that are timed on it."""

    def __init__(
        self,
        size: str,
        precision: str,
        threads: int,
        seconds: float = SECONDS,
        kv_precision: str = "bfloat16",
        group: int = GROUPS[0],
    ) -> None:
        self.size, self.precision, self.seconds = size, precision, seconds
        self.config = SIZES[size]()
        self.native = require_native()
        self.team = self.native.Team(threads)
        self.group = group
        weights = RandomWeights(self.config, precision, group)
        self.packed = PackedModel(Model(self.config, weights, byte_tokenizer(512)), precision)
        self.layout = self._layout(kv_precision)

    def _layout(self, kv_precision: str) -> TileLayout:
        """Of the KV pages; every channel of int8 keys has the range 1, as the random weights have no bias."""
        c, dtype = self.config.decoder, KV_DTYPES[kv_precision]
        ranges = torch.ones(c.layers, c.kv_heads, c.head_width) if dtype == torch.int8 else None
        return TileLayout(dtype, c.head_width, ranges)

    @property
    def weight_bytes(self) -> float:
        """Of one weight of the decoder, its share of a scale included."""
        return WEIGHT_BYTES[self.precision] + (2 / self.group if self.precision == "int4" else 0)

    def ceilings(self) -> dict[str, float]:
        """Operations (float32, bfloat16, int8) and bytes (read) a second, of all threads together."""
        return {name: self.native.ceiling(kind, self.team) for kind, name in enumerate(CEILINGS)}

    def figure(
        self,
        name: str,
        call: Callable[[], object],
        operations: float,
        moved: float,
        sessions: int = 1,
        context: int = 0,
        precision: str | None = None,
    ) -> Figure:
        """Time a call between two measurements of the ceilings."""
        precision = precision or self.precision
        before = self.ceilings()
        call()
        seconds: list[float] = []
        until = time.perf_counter() + self.seconds
        while len(seconds) < 3 or (time.perf_counter() < until and len(seconds) < 500):
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
        after = self.ceilings()
        ceilings = {key: max(before[key], after[key]) for key in before}
        arithmetic, read = operations / ceilings[_peak_of(precision)], moved / ceilings["read"]
        floor, median = max(arithmetic, read), float(np.median(seconds))
        return Figure(
            name=name,
            size=self.size,
            precision=precision,
            sessions=sessions,
            context=context,
            median_ms=median * 1e3,
            p99_ms=float(np.percentile(seconds, 99)) * 1e3,
            minimum_ms=min(seconds) * 1e3,
            calls=len(seconds),
            operations=operations,
            bytes=moved,
            floor_ms=floor * 1e3,
            share=floor / median,
            bound="arithmetic" if arithmetic > read else "read",
            ceilings=ceilings,
        )

    # ---- what is timed -------------------------------------------------------------------------------

    def mel(self, sessions: int) -> Figure:
        """One chunk of each session, one thread."""
        c = self.config
        state, slots = MelState.empty(sessions), torch.arange(sessions)
        pcm = 0.1 * torch.randn(sessions, c.chunk_samples)
        operations = sessions * (c.chunk_frames + 1) * 12_500  # bench/NOTES.md, mel
        moved = sessions * 4.0 * (c.chunk_samples + c.chunk_frames * MEL_BINS)
        return self.figure(
            "mel", lambda: mel_chunk(state, slots, pcm), operations, moved, sessions, precision="float32"
        )

    def encoder_call(self, sessions: int) -> Callable[[], None]:
        """One chunk of each session: mel frames to audio tokens."""
        c = self.config
        frames = torch.randn(sessions, c.chunk_frames, MEL_BINS)
        tokens = torch.empty(sessions, c.chunk_tokens, c.decoder.width)

        def call() -> None:
            self.packed.encoder.encode(
                self.team, sessions, c.chunk_frames, frames.data_ptr(), tokens.data_ptr()
            )

        return call

    def encoder(self, sessions: int) -> Figure:
        """The time of `encoder_call`."""
        c = self.config
        count = sum(math.prod(s) for n, s in encoder_shapes(c).items() if len(s) > 1)
        precision = "int8" if self.precision == "int4" else self.precision
        call = self.encoder_call(sessions)
        operations = 2.0 * count * sessions * c.chunk_frames / 2
        return self.figure(
            "encoder", call, operations, count * WEIGHT_BYTES[precision], sessions, precision=precision
        )

    def step_call(self, rows: int, sessions: int, context: int, logits: bool) -> Callable[[], None]:
        """A ragged step: `rows` new rows for each session behind `context` positions."""
        c, total = self.config.decoder, rows * sessions
        pages = -(-(context + rows) // PAGE)
        content, layout = torch.randn(1, pages * sessions, PAGE, c.kv_heads, c.head_width), self.layout
        keys, values = (
            layout.pool(c, pages * sessions, PAGE, "cpu").copy_(make(content))
            for make in (layout.of_keys, layout.of_values)
        )
        hidden = torch.randn(total, c.width)
        position = torch.arange(context, context + rows).repeat(sessions)
        table = torch.arange(pages * sessions, dtype=torch.int32).view(sessions, pages)
        slots = torch.cat([table[b, position[:rows] // PAGE].long() * PAGE for b in range(sessions)])
        slots += position % PAGE
        starts = torch.arange(0, total + 1, rows, dtype=torch.int32)
        lens = torch.full((sessions,), context + rows, dtype=torch.int32)
        gaps = torch.zeros(sessions, 2, dtype=torch.int32)
        drawn = torch.arange(rows - 1, total, rows) if logits else torch.empty(0, dtype=torch.int64)
        out = torch.empty(len(drawn), c.vocab_padded)

        x = torch.empty_like(hidden)

        def call() -> None:
            x.copy_(hidden)
            self.packed.decoder.decode(
                team=self.team,
                rows=total,
                sequences=sessions,
                x=x.data_ptr(),
                positions=position.data_ptr(),
                slots=slots.data_ptr(),
                row_starts=starts.data_ptr(),
                block_table=table.data_ptr(),
                table_width=pages,
                kv_lens=lens.data_ptr(),
                gaps=gaps.data_ptr(),
                page_format=TILE_FORMATS[layout.dtype],
                k_pages=keys.data_ptr(),
                v_pages=values.data_ptr(),
                pages=pages * sessions,
                page_tokens=PAGE,
                logit_rows=len(drawn),
                logit_row=drawn.data_ptr(),
                logits=out.data_ptr(),
                page_layout=int(layout.tiled),
                key_range=address(layout.key_range),
            )

        return call

    def step(self, name: str, rows: int, sessions: int, context: int, logits: bool) -> Figure:
        """The time of `step_call`."""
        operations, moved = self._step_work(rows, sessions, context, logits)
        call = self.step_call(rows, sessions, context, logits)
        return self.figure(name, call, operations, moved, sessions, context)

    def _step_work(self, rows: int, sessions: int, context: int, logits: bool) -> tuple[float, float]:
        """(operations, bytes) of a step: weights once, keys and values once, attention counted."""
        c = self.config.decoder
        layers = sum(
            math.prod(s) for n, s in decoder_shapes(self.config).items() if ".layers." in n and len(s) > 1
        )
        head = c.vocab_padded * c.width * logits
        seen = rows * context + rows * (rows + 1) / 2
        attention = 4.0 * c.layers * c.heads * c.head_width * seen * sessions
        operations = 2.0 * sessions * (rows * layers + head) + attention
        kv = 2.0 * c.layers * slot_bytes(c, self.layout.dtype) * (context + rows) * sessions
        return operations, (layers + head) * self.weight_bytes + kv

    def linear(self, name: str, weight: Tensor | Quantised, rows: int) -> Figure:
        """One matrix of the model, in copies that together exceed the caches."""
        outputs, inputs = weight.shape
        copies = max(2, min(16, int((192 << 20) / (outputs * inputs * self.weight_bytes))))
        packed = [self.packed.pack(weight, self.precision) for _ in range(copies)]
        x, out, turn = torch.randn(rows, inputs), torch.empty(rows, outputs), iter(range(1 << 30))

        def call() -> None:
            self.native.linear(
                packed[next(turn) % copies],
                self.team,
                rows,
                x.data_ptr(),
                inputs,
                0,
                0,
                0,
                0,
                out.data_ptr(),
                outputs,
            )

        operations = 2.0 * rows * outputs * inputs
        return self.figure(f"linear {name}", call, operations, outputs * inputs * self.weight_bytes)

    def figures(self, sessions: list[int], contexts: list[int]) -> Iterator[Figure]:
        """All of them, one after the other."""
        weights = RandomWeights(self.config, self.precision, self.group)
        for name in ("qkv", "out", "gate_up", "down"):
            for rows in (1, self.config.chunk_rows):
                yield self.linear(f"{name} [{rows} rows]", weights[f"decoder.layers.0.{name}.weight"], rows)
        for count in sessions:
            yield self.mel(count)
            yield self.encoder(count)
            for context in contexts:
                if count * context <= 64 * 4096:
                    yield self.step("listening step", self.config.chunk_rows, count, context, logits=False)
                    yield self.step("text token", 1, count, context, logits=True)


def table(figures: list[Figure]) -> list[str]:
    """Aligned lines, a header first."""
    lines = [
        f"{'call':<28}{'precision':<10}{'sessions':>8}{'context':>8}{'median ms':>11}{'p99 ms':>10}"
        f"{'floor ms':>10}{'share':>7}{'of peak':>9}{'of read':>9}  bound"
    ]
    lines += [
        f"{f.name:<28}{f.precision:<10}{f.sessions:>8}{f.context:>8}{f.median_ms:>11.3f}{f.p99_ms:>10.3f}"
        f"{f.floor_ms:>10.3f}{f.share:>7.0%}{f.of_peak:>9.0%}{f.of_read:>9.0%}  {f.bound}"
        for f in figures
    ]
    return lines


def roofline(figures: list[Figure], path: str) -> None:
    """The figures under the roofs of their formats, as a PNG: operations a second over operations a byte."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(plot)
    axes = plot.add_subplot()
    density = np.geomspace(0.5, 2000, 200)
    best = {key: max(f.ceilings[key] for f in figures) for key in CEILINGS}
    for key in CEILINGS[:3]:
        roof = np.minimum(best[key], density * best["read"])
        axes.loglog(density, roof / 1e12, color="grey", linewidth=1)
        axes.annotate(
            f"{key} {best[key] / 1e12:.2f} T/s", (density[-1], roof[-1] / 1e12), ha="right", va="bottom"
        )
    for number, name in enumerate(dict.fromkeys(f.name for f in figures)):
        group = [f for f in figures if f.name == name]
        x = [f.operations / f.bytes for f in group]
        y = [f.operations / f.median_ms / 1e9 for f in group]
        marker, colour = MARKERS[number // 10 % len(MARKERS)], f"C{number % 10}"
        axes.loglog(x, y, marker, color=colour, label=name)
        if len(group) > 1:
            for i, (f, across, up) in enumerate(zip(group, x, y, strict=True)):
                told, place = f"{f.sessions} x {f.context}", (5, 3 - 8 * (i % 2))  # neighbours: above, below
                axes.annotate(told, (across, up), place, textcoords="offset points", fontsize=6)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("10¹² operations per second")
    axes.set_title(
        f"{figures[0].size}, {figures[0].precision}: read {best['read'] / 1e9:.0f} GB/s from memory; what "
        "stays in a cache may lie above that line",
        fontsize=10,
    )
    axes.legend(fontsize=7, title="sessions x context at each point", title_fontsize=7)
    plot.savefig(path, dpi=120)
