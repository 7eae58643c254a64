"""Cases of every op at the dims of a model: what parity checks and what `ops` times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator

from fastloop.config import MEL_BINS, ModelConfig
from fastloop.engine.buckets import MOST_CHUNKS
from fastloop.ops.block_attention import block_attention_bytes
from fastloop.ops.conv_stem import conv_stem_bytes
from fastloop.ops.decide import decide_bytes
from fastloop.ops.layer_norm import layer_norm_bytes
from fastloop.ops.linear import linear_bytes, linear_flops
from fastloop.ops.linear_quantised import linear_quantised_bytes
from fastloop.ops.mel import mel_bytes
from fastloop.ops.paged_attention import paged_attention_bytes
from fastloop.ops.rms_norm import rms_norm_bytes
from fastloop.ops.rope_append import rope_append_bytes
from fastloop.ops.sample import sample_bytes
from fastloop.testing import op_cases as cases
from fastloop.testing.op_cases import Case


@dataclass(frozen=True)
class Shape:
    """One call to time: how to draw it, what it moves and computes, which arguments a step finds cold,
    whether it is paged_attention of many sequences.
    """

    name: str
    op: str
    draw: Callable[[Generator], Case]
    moved: float
    operations: float = 0
    cold: tuple[str, ...] = ()
    batch: bool = False


def linears(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Every matrix of the model: its dims and epilogue."""
    e, d = config.encoder, config.decoder
    return {
        "encoder qkv": {"width_in": e.width, "width_out": 3 * e.width, "bias": True},
        "encoder out": {"width_in": e.width, "width_out": e.width, "bias": True, "residual": True},
        "encoder fc1": {"width_in": e.width, "width_out": e.ffn, "bias": True, "epilogue": "gelu"},
        "encoder fc2": {"width_in": e.ffn, "width_out": e.width, "bias": True, "residual": True},
        "decoder qkv": {"width_in": d.width, "width_out": d.qkv_rows},
        "decoder out": {"width_in": d.heads * d.head_width, "width_out": d.width, "residual": True},
        "decoder gate_up": {"width_in": d.width, "width_out": 2 * d.ffn, "epilogue": "silu_gate"},
        "decoder down": {"width_in": d.ffn, "width_out": d.width, "residual": True},
        "decoder head": {"width_in": d.width, "width_out": d.vocab_padded},
    }


def _linear(name: str, rows: int, dims: dict[str, Any], dtype: torch.dtype) -> Shape:
    width_in, width_out = dims["width_in"], dims["width_out"]
    return Shape(
        f"linear {name}, {rows} rows",
        "linear",
        lambda g: cases.linear_case(g, rows=rows, dtype=dtype, **dims),
        linear_bytes(rows, width_in, width_out, dtype.itemsize, dtype.itemsize),
        linear_flops(rows, width_in, width_out),
        ("weight",),
    )


def _quantised(name: str, kind: str, rows: int, dims: dict[str, Any], dtype: torch.dtype) -> Shape:
    width_in, width_out = dims["width_in"], dims["width_out"]
    bits, group = (4, 32) if kind == "int4" else (8, 0)
    return Shape(
        f"linear_quantised {name}, {kind}, {rows} rows",
        "linear_quantised",
        lambda g: cases.linear_quantised_case(g, kind=kind, rows=rows, dtype=dtype, **dims),
        linear_quantised_bytes(rows, width_in, width_out, dtype.itemsize, bits, group),
        linear_flops(rows, width_in, width_out),
        ("values",),
    )


def _paged(
    rows: int, streams: int, context: int, config: ModelConfig, dtype: torch.dtype, scaled: bool = False
) -> Shape:
    """`streams` sequences with `rows` new rows each behind `context` slots; scaled: float8 pages."""
    d, length = config.decoder, context + rows
    sizes = {"heads": d.heads, "kv_heads": d.kv_heads, "head_width": d.head_width}

    def draw(g: Generator) -> Case:
        return cases.paged_attention_case(
            g, rows=[rows] * streams, lens=[length] * streams, gaps=[(0, 0)] * streams, page=64, dtype=dtype,
            scaled=scaled, **sizes,
        )  # fmt: skip

    moved = paged_attention_bytes(
        rows * streams,
        length * streams,
        **sizes,
        itemsize=dtype.itemsize,
        page_itemsize=1 if scaled else None,
    )
    work = 4 * rows * streams * length * d.heads * d.head_width
    name = f"paged_attention, {streams} x {rows} rows at {context}" + ", fp8 pages" * scaled
    batch = streams > 1 and not scaled
    return Shape(name, "paged_attention", draw, moved, work, ("k_pages", "v_pages"), batch)


def shapes(config: ModelConfig, dtype: torch.dtype, dry: bool) -> list[Shape]:
    """What `ops` times, in the order of the path."""
    e, d, size = config.encoder, config.decoder, dtype.itemsize
    chunk, rows = config.chunk_frames // 2, config.chunk_rows
    found = [
        Shape(f"mel, {n} streams", "mel", lambda g, n=n: cases.mel_case(g, streams=n), mel_bytes(n, 6400))
        for n in ((1,) if dry else (1, 64))
    ]
    found += [
        Shape(
            "conv_stem, 1 chunk", "conv_stem",
            lambda g: cases.conv_stem_case(g, blocks=1, width=e.width, dtype=dtype),
            conv_stem_bytes(1, config.chunk_frames, MEL_BINS, e.width, size), cold=("weight1", "weight2"),
        ),
        Shape(
            "layer_norm", "layer_norm",
            lambda g: cases.layer_norm_case(g, rows=chunk, width=e.width, dtype=dtype),
            layer_norm_bytes(chunk, e.width, size),
        ),
        Shape(
            "block_attention, 1 chunk", "block_attention",
            lambda g: cases.block_attention_case(
                g, blocks=1, positions=chunk, heads=e.heads, head_width=e.head_width, dtype=dtype
            ),
            block_attention_bytes(1, chunk, e.width, size),
        ),
        Shape(
            "rms_norm + residual", "rms_norm",
            lambda g: cases.rms_norm_case(g, rows=rows, width=d.width, residual=True, dtype=dtype),
            rms_norm_bytes(rows, d.width, size, True),
        ),
    ] + [
        Shape(
            "rope_append" + ", fp8 pages" * scaled, "rope_append",
            lambda g, scaled=scaled: cases.rope_append_case(
                g, rows=rows, heads=d.heads, kv_heads=d.kv_heads, head_width=d.head_width, page=64, padded=0,
                dtype=dtype, scaled=scaled,
            ),
            rope_append_bytes(rows, d.heads, d.kv_heads, d.head_width, size),
        )
        for scaled in (False, True)
    ]  # fmt: skip
    for name, dims in linears(config).items():
        layers = (1, rows, 64, MOST_CHUNKS * rows)
        counts = (chunk,) if name.startswith("encoder") else (1,) if name.endswith("head") else layers
        found += [_linear(name, n, dims, dtype) for n in ((counts[0],) if dry else counts)]
    for name in ("decoder gate_up", "decoder down"):
        dims = linears(config)[name]
        wanted = [("int8", 1)] if dry else [("fp8", 1), ("fp8", rows), ("int4", 1), ("int8", rows)]
        found += [_quantised(name, kind, n, dims, dtype) for kind, n in wanted]
    contexts = [(rows, 1, 20), (1, 2, 20)] if dry else [
        (rows, 1, 1024), (rows, 1, 4096), (1, 1, 1024), (rows, 8, 4096), (rows, 64, 1024), (rows, 64, 4096),
        (1, 64, 4096),
    ]  # fmt: skip
    found += [_paged(n, streams, context, config, dtype) for n, streams, context in contexts]
    scaled = contexts[1:] if dry else [(rows, 1, 4096), (1, 1, 1024), (rows, 64, 4096)]
    found += [_paged(n, streams, context, config, dtype, True) for n, streams, context in scaled]
    found += [
        Shape(
            "decide", "decide",
            lambda g: cases.decide_case(g, rows=1, width=d.width, sessions=1, dtype=dtype),
            decide_bytes(1, d.width, size),
        ),
        Shape(
            "sample, 5 rows of every kind", "sample",
            lambda g: cases.sample_case(g, rows=5, vocab=d.vocab_padded, dtype=dtype),
            sample_bytes(5, d.vocab_padded, size),
        ),
    ]  # fmt: skip
    return found


def model_cases(config: ModelConfig, dtype: torch.dtype) -> dict[str, Callable[[Generator], list[Case]]]:
    """One case of each op at the dims of the model (not `decide`, whose decisions in 16 bits may differ)."""
    d = config.decoder
    chosen = [
        s
        for s in shapes(config, dtype, dry=True)
        if s.op not in ("decide", "linear", "linear_quantised", "sample")
    ]
    grouped: dict[str, Callable[[Generator], list[Case]]] = {
        op: lambda g, op=op: [s.draw(g) for s in chosen if s.op == op] for op in {s.op for s in chosen}
    }
    dims = {"width_in": d.width, "width_out": 2 * d.ffn, "epilogue": "silu_gate"}
    down = {"width_in": d.ffn, "width_out": d.width, "residual": True}
    grouped["linear"] = lambda g: [
        cases.linear_case(g, rows=n, dtype=dtype, **kind) for kind in (dims, down) for n in (1, 13, 64)
    ]
    grouped["linear_quantised"] = lambda g: [
        cases.linear_quantised_case(g, kind=kind, rows=n, dtype=dtype, **down)
        for kind, n in (("fp8", 13), ("fp8", 1), ("int8", 13), ("int4", 1))
    ]
    grouped["sample"] = lambda g: [cases.sample_case(g, rows=5, vocab=d.vocab_padded, dtype=dtype)]
    alone = grouped["paged_attention"]
    grouped["paged_attention"] = lambda g: [*alone(g), listeners(g, config, dtype)]
    return grouped


def listeners(g: Generator, config: ModelConfig, dtype: torch.dtype) -> Case:
    """Nine of them and a speaker, with contexts that split within steps: a batch as kernels are made for."""
    d, rows = config.decoder, config.chunk_rows
    return cases.paged_attention_case(
        g, rows=[rows] * 9 + [1], lens=[rows + 113 * b for b in range(10)],
        gaps=[(0, 0), *((5, 9 * b) for b in range(1, 10))], page=64, heads=d.heads, kv_heads=d.kv_heads,
        head_width=d.head_width, dtype=dtype,
    )  # fmt: skip


def small_bfloat16(g: Generator) -> list[Case]:
    """linear in bfloat16 at sizes that leave a rest of every tile, for kernels that take nothing else."""
    sizes = ((1, 8, 8), (13, 200, 300), (9, 67, 130), (33, 1096, 256), (64, 64, 64), (65, 136, 72))
    return [
        cases.linear_case(
            g, rows=n, width_in=i, width_out=o, bias=True, residual=True, epilogue=e, dtype=torch.bfloat16
        )
        for n, i, o in sizes
        for e in ("none", "gelu", "silu_gate")
    ]


def small_scaled(g: Generator, op: str, dtype: torch.dtype) -> list[Case]:
    """rope_append and paged_attention over float8 pages: odd sizes, gaps, split contexts."""
    if op == "rope_append":
        return [
            cases.rope_append_case(g, rows=n, kv_heads=k, heads=7 * k, head_width=w, dtype=dtype, scaled=True)
            for n, k, w in ((1, 1, 2), (13, 2, 128), (65, 3, 96))
        ]
    return [
        cases.paged_attention_case(
            g,
            rows=rows,
            lens=lens,
            gaps=gaps,
            kv_heads=k,
            heads=7 * k,
            head_width=w,
            dtype=dtype,
            scaled=True,
        )
        for rows, lens, gaps in (
            ((13, 1), (400, 333), ((5, 170), (0, 300))),
            ((1,) * 5, (3, 50, 1, 120, 64), ((0, 0), (31, 33), (0, 0), (16, 48), (5, 9))),
        )
        for k, w in ((1, 24), (2, 128))
    ]


def small_quantised(g: Generator) -> list[Case]:
    """The same of linear_quantised."""
    return [
        cases.linear_quantised_case(
            g, kind=kind, rows=n, width_in=i, width_out=o, bias=True, epilogue=e, dtype=torch.bfloat16
        )
        for kind in ("fp8", "int4", "int4-64")
        for n, i, o, e in ((1, 64, 8, "none"), (13, 832, 300, "silu_gate"), (33, 1024, 130, "gelu"))
    ]
