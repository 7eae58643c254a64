"""The calls that a step of the 3B model makes of each op, on tensors without memory ("meta").

    {op: {name of the call: a function that makes it}}

For whatever wants to know what would run without running it: `resources` compiles them. Inside
`made_on(device)` they are made on zeros there: every kernel of the model is then compiled and run once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import MEL_BINS, published_3b
from ..ops.mel import COLUMNS, TAIL_SAMPLES
from .block_attention import block_attention_triton
from .conv_stem import conv_stem_triton
from .decide import decide_triton
from .layer_norm import layer_norm_triton
from .linear import linear_triton
from .linear_quantised import linear_quantised_triton
from .mel import mel_triton
from .paged_attention import paged_attention_triton
from .rms_norm import rms_norm_triton
from .rope_append import rope_append_triton
from .sample import sample_triton

MODEL = published_3b()
E, D = MODEL.encoder.width, MODEL.decoder.width
BF16, F32 = torch.bfloat16, torch.float32


_device: contextvars.ContextVar[str] = contextvars.ContextVar("device", default="meta")


@contextlib.contextmanager
def made_on(device: str) -> Iterator[None]:
    """Inside, the calls are made on zeros of this device."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=_device.get())


def _layer_norm(rows: int, dtype: torch.dtype = BF16) -> None:
    weight = _empty(E, dtype=dtype)
    layer_norm_triton(_empty(rows, E, dtype=dtype), weight, weight, 1e-5)


def _rms_norm(rows: int, dtype: torch.dtype = BF16, residual: bool = False) -> None:
    x = _empty(rows, D, dtype=dtype)
    rms_norm_triton(x, _empty(D, dtype=dtype), 1e-6, x if residual else None)


def _linear(
    rows: int,
    width_in: int,
    width_out: int,
    epilogue: str = "none",
    bias: bool = False,
    residual: bool = False,
    weight: torch.dtype = BF16,
    dtype: torch.dtype = BF16,
) -> None:
    """weight: BF16 or F32 as `dtype`, or a quantised one (uint8: int4 in groups of 32)."""
    made = width_out // 2 if epilogue == "silu_gate" else width_out
    optional = {
        "bias": _empty(width_out, dtype=dtype) if bias else None,
        "residual": _empty(rows, made, dtype=dtype) if residual else None,
    }
    x = _empty(rows, width_in, dtype=dtype)
    if weight == dtype:
        linear_triton(x, _empty(width_out, width_in, dtype=dtype), epilogue=epilogue, **optional)
        return
    group = 32 if weight == torch.uint8 else 0
    values = _empty(width_out, width_in // 2 if group else width_in, dtype=weight)
    scale = _empty(width_out, width_in // group) if group else _empty(width_out, dtype=F32)
    linear_quantised_triton(x, values, scale, epilogue=epilogue, **optional)


H, G, K = MODEL.decoder.heads, MODEL.decoder.kv_heads, MODEL.decoder.head_width
PAGES, PAGE = 1024, 64
I32, I64, FLOAT8 = torch.int32, torch.int64, torch.float8_e4m3fn


def _frequencies() -> Tensor:
    return _empty(K // 2, dtype=torch.float64)


def _rope_append(rows: int, dtype: torch.dtype = BF16, scaled: bool = False) -> None:
    pages = _empty(PAGES, PAGE, G, K, dtype=FLOAT8 if scaled else dtype)
    scale = _empty(2, G, dtype=F32) if scaled else None
    index = _empty(rows, dtype=I64)
    inv_freq = _frequencies()
    qkv, bias = _empty(rows, QKV, dtype=dtype), _empty(QKV, dtype=dtype)
    rope_append_triton(qkv, bias, index, index, inv_freq, pages, pages, scale)


def _paged_attention(
    rows: int,
    sequences: int,
    dtype: torch.dtype = BF16,
    page_dtype: torch.dtype | None = None,
    scaled: bool = False,
) -> None:
    pages = _empty(PAGES, PAGE, G, K, dtype=FLOAT8 if scaled else page_dtype or dtype)
    extras = (_empty(2, G, dtype=F32), _empty(QKV, dtype=dtype), _empty(rows, dtype=I64), _frequencies())
    index, table = _empty(sequences, dtype=I32), _empty(sequences, 64, dtype=I32)
    starts, gaps = _empty(sequences + 1, dtype=I32), _empty(sequences, 2, dtype=I32)
    q = _empty(rows, H, K, dtype=dtype)
    paged_attention_triton(q, pages, pages, table, starts, index, gaps, *(extras if scaled else ()))


def _conv_stem(blocks: int, dtype: torch.dtype = BF16) -> None:
    bias = _empty(E, dtype=dtype)
    weight1, weight2 = _empty(E, MEL_BINS, 3, dtype=dtype), _empty(E, E, 3, dtype=dtype)
    frames = _empty(blocks, MODEL.chunk_frames, MEL_BINS, dtype=F32)
    conv_stem_triton(frames, weight1, bias, weight2, bias, _empty(100, E, dtype=dtype))


def _decide(rows: int, dtype: torch.dtype = BF16) -> None:
    policy, state = _empty(1024, 3, dtype=F32), _empty(1024, 2, dtype=I32)
    weight, head, slots = _empty(D, dtype=dtype), _empty(2, D, dtype=dtype), _empty(rows, dtype=I64)
    decide_triton(_empty(rows, D, dtype=dtype), weight, 1e-6, head, slots, policy, state)


def _mel(streams: int, edge: str = "reflect", clamp: str = "running") -> None:
    pcm, slots = _empty(streams, MODEL.chunk_samples, dtype=F32), _empty(streams, dtype=I64)
    tail, peak = _empty(1024, TAIL_SAMPLES, dtype=F32), _empty(1024, dtype=F32)
    filters, bands = _empty(MEL_BINS, COLUMNS, dtype=F32), _empty(MEL_BINS, 2, dtype=I32)
    mel_triton(pcm, slots, tail, peak, _empty(1024, dtype=I64), filters, bands, edge, clamp)


def _sample(rows: int, dtype: torch.dtype = BF16) -> None:
    vocab = MODEL.decoder.vocab_padded
    numbers, ints = _empty(rows, dtype=F32), _empty(rows, dtype=I64)
    banned = _empty(2, vocab, dtype=torch.bool)
    sample_triton(_empty(rows, vocab, dtype=dtype), banned, ints, numbers, ints, numbers, ints, ints)


QKV, FFN, VOCAB = MODEL.decoder.qkv_rows, MODEL.decoder.ffn, MODEL.decoder.vocab_padded
LINEAR: dict[str, Callable[..., None]] = {  # the matrices of the model, by the rows of a call
    "decoder qkv": lambda rows, **kept: _linear(rows, D, QKV, **kept),
    "decoder out": lambda rows, **kept: _linear(rows, D, D, residual=True, **kept),
    "decoder gate_up": lambda rows, **kept: _linear(rows, D, 2 * FFN, "silu_gate", **kept),
    "decoder down": lambda rows, **kept: _linear(rows, FFN, D, residual=True, **kept),
    "decoder head": lambda rows, **kept: _linear(rows, D, VOCAB, **kept),
    "encoder qkv": lambda rows, **kept: _linear(rows, E, 3 * E, bias=True, **kept),
    "encoder out": lambda rows, **kept: _linear(rows, E, E, bias=True, residual=True, **kept),
    "encoder fc1": lambda rows, **kept: _linear(rows, E, 4 * E, "gelu", bias=True, **kept),
    "encoder fc2": lambda rows, **kept: _linear(rows, 4 * E, E, bias=True, residual=True, **kept),
    "encoder proj": lambda rows, **kept: _linear(rows, E, D, bias=True, **kept),
}
FEW_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
STEPS = {  # of one stream: precision -> rows of the decoder, of the encoder
    "int8": ((13,), (20,)),  # also the encoder of an int4 checkpoint
    "fp8": ((1, 13), (20,)),
    "int4": ((1, 13), ()),
}


def _in_few_bits() -> dict[str, Callable[[], Any]]:
    """The matrices of the layers in every precision of `fastloop convert`."""
    found: dict[str, Callable[[], Any]] = {}
    for kept, (decoder_rows, encoder_rows) in STEPS.items():
        for name, call in LINEAR.items():
            rows = decoder_rows if name.startswith("decoder") else encoder_rows
            for n in () if name.endswith(("head", "proj")) else rows:
                found[f"{kept} {name}, {n} rows"] = functools.partial(call, n, weight=FEW_BITS[kept])
    return found


CALLS: dict[str, dict[str, Callable[[], Any]]] = {
    "layer_norm": {"a chunk": lambda: _layer_norm(20), "float32": lambda: _layer_norm(20, F32)},
    "rms_norm": {
        "a listening step": lambda: _rms_norm(13),
        "with a residual": lambda: _rms_norm(13, residual=True),
        "float32": lambda: _rms_norm(13, F32),
    },
    "linear": {
        f"{name}, {rows} rows": functools.partial(call, rows)
        for rows in (1, 13, 20, 64, 208)
        for name, call in LINEAR.items()
    }
    | {
        "float32": lambda: _linear(13, D, D, dtype=F32, weight=F32),
        "float32 gate_up": lambda: _linear(40, D, 2 * FFN, "silu_gate", dtype=F32, weight=F32),
    },
    "linear_quantised": _in_few_bits()
    | {
        "fp8 gate_up, 208 rows": lambda: _linear(208, D, 2 * FFN, "silu_gate", weight=torch.float8_e4m3fn),
        "int4 gate_up, 64 rows": lambda: _linear(64, D, 2 * FFN, "silu_gate", weight=torch.uint8),
    },
    "rope_append": {
        "a listening step": lambda: _rope_append(13),
        "many rows": lambda: _rope_append(208),
        "scaled pages": lambda: _rope_append(13, scaled=True),
        "many rows, scaled pages": lambda: _rope_append(208, scaled=True),
        "float32": lambda: _rope_append(13, F32),
    },
    "block_attention": {
        "a chunk": lambda: block_attention_triton(_empty(1, 20, 3 * E), MODEL.encoder.heads),
        "a block of offline mode": lambda: block_attention_triton(_empty(1, 100, 3 * E), MODEL.encoder.heads),
        "float32": lambda: block_attention_triton(_empty(1, 20, 3 * E, dtype=F32), MODEL.encoder.heads),
    },
    "paged_attention": {
        "a listening step": lambda: _paged_attention(13, 1),
        "a text token": lambda: _paged_attention(1, 1),
        "64 listeners": lambda: _paged_attention(832, 64),
        "64 speakers": lambda: _paged_attention(64, 64),
        "fp8 pages": lambda: _paged_attention(13, 1, page_dtype=FLOAT8),
        "scaled pages": lambda: _paged_attention(13, 1, scaled=True),
        "a text token, scaled pages": lambda: _paged_attention(1, 1, scaled=True),
        "64 listeners, scaled pages": lambda: _paged_attention(832, 64, scaled=True),
        "float32": lambda: _paged_attention(13, 1, F32),
        "float32, scaled pages": lambda: _paged_attention(13, 1, F32, scaled=True),
    },
    "conv_stem": {
        "a chunk": lambda: _conv_stem(1),
        "64 chunks": lambda: _conv_stem(64),
        "float32": lambda: _conv_stem(1, F32),
    },
    "decide": {
        "one stream": lambda: _decide(1),
        "1024 streams": lambda: _decide(1024),
        "float32": lambda: _decide(1, F32),
    },
    "mel": {
        "one stream": lambda: _mel(1),
        "1024 streams": lambda: _mel(1024),
        "edge wait": lambda: _mel(1, "wait"),
        "clamp global": lambda: _mel(1, "reflect", "global"),
    },
    "sample": {"a token": lambda: _sample(1), "float32": lambda: _sample(1, F32)},
}

BATCHES: dict[str, Callable[[int], Any]] = {  # calls by how many sequences, decisions or chunks they have
    "paged_attention": lambda rows: _paged_attention(rows, rows),
    "paged_attention, scaled pages": lambda rows: _paged_attention(rows, rows, scaled=True),
    "decide": _decide,
    "conv_stem": _conv_stem,
}

QUICK = {  # the calls that one stream makes: one of each kernel
    "layer_norm": ["a chunk"],
    "rms_norm": ["a listening step"],
    "linear": ["decoder gate_up, 13 rows", "decoder down, 13 rows", "encoder fc1, 20 rows"],
    "linear_quantised": [
        "int8 encoder fc1, 20 rows",
        "fp8 decoder gate_up, 13 rows",
        "int4 decoder down, 1 rows",
    ],
    "rope_append": ["a listening step", "scaled pages"],
    "block_attention": ["a chunk"],
    "paged_attention": ["a listening step", "a text token", "scaled pages"],
    "conv_stem": ["a chunk"],
    "decide": ["one stream"],
    "mel": ["one stream"],
    "sample": ["a token"],
}
