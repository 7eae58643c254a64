"""Calls of the ops on random inputs of any size: what the self-check, the tests and the benchmarks run.

`<op>_case` draws one call; CASES has a few small ones of each op. What an op may not read (KV slots that no
row sees, pages of nobody, padding of the block table, spare position rows) holds NaN or impossible numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES, MEL_BINS
from ..ops.linear import linear_ref
from ..ops.mel import POWER_FLOOR, RANGE_LOG10, TAIL_SAMPLES, mel_filters
from ..quantise import dequantise_int4, dequantise_int8, quantise_fp8, quantise_int4, quantise_int8

Arguments = dict[str, Any]
FLOAT8 = torch.float8_e4m3fn  # of scaled KV pages
POISON_INDEX = 2**31 - 1  # in int32 entries that nobody may read


@dataclass(frozen=True)
class Case:
    """One call of an op: its arguments (on the CPU), which of them it changes, the truth where the reference
    does not run in float64, and a function of the first result that is compared in its place.
    """

    arguments: Arguments
    mutates: tuple[str, ...] = ()
    truth: Callable[[Arguments], list[Tensor]] | None = None
    measure: Callable[[Tensor], Tensor] = torch.Tensor.double


def _normal(g: Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=g)).to(dtype)


def _ints(values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def mel_case(g: Generator, *, streams: int = 2, samples: int = 6400, bins: int = MEL_BINS) -> Case:
    """The first call of each stream, in slots of a shuffled order."""
    filters, bands = mel_filters(bins=bins)
    arguments = {
        "pcm": 0.3 * torch.randn(streams, samples, generator=g),
        "slots": torch.randperm(streams, generator=g),
        "tail": torch.zeros(streams, TAIL_SAMPLES),
        "peak": torch.full((streams,), -torch.inf),
        "seen": torch.zeros(streams, dtype=torch.int64),
        "filters": filters,
        "bands": bands,
    }
    return Case(arguments, mutates=("tail", "peak", "seen"), truth=_first_chunk, measure=_mel_power)


def _mel_power(frames: Tensor) -> Tensor:
    """What the logarithm was taken of: near zero that blows any rounding up, and one bin would decide."""
    return 10 ** (4 * frames.double() - 4)


def _first_chunk(arguments: Arguments) -> list[Tensor]:
    """Whisper's log-mel of the first chunk of each stream in float64, and the state it leaves."""
    pcm, filters = arguments["pcm"].double(), arguments["filters"].double()
    padded = F.pad(pcm[:, None], (FFT_SAMPLES // 2, FFT_SAMPLES // 2), mode="reflect")[:, 0]
    window = torch.hann_window(FFT_SAMPLES, dtype=torch.float64)
    cut: dict[str, Any] = {"window": window, "center": False, "return_complex": True}
    power = torch.stft(padded, FFT_SAMPLES, HOP_SAMPLES, **cut).abs().square()[..., :-1]
    y = (filters @ power).clamp(min=POWER_FLOOR).log10()  # [B, C, F]
    frames = torch.maximum(y, y.amax((1, 2), keepdim=True) - RANGE_LOG10)
    final = y[..., :-1].amax((1, 2))  # the last frame is provisional
    order = arguments["slots"].argsort()
    seen = torch.full((len(pcm),), pcm.shape[1])
    return [(frames.mT + 4) / 4, pcm[order, -TAIL_SAMPLES:], final[order], seen]


def conv_stem_case(
    g: Generator,
    *,
    blocks: int = 2,
    frames: int = 40,
    bins: int = MEL_BINS,
    width: int = 32,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`spare`: rows of the position table behind those that the frames reach."""
    length = (frames + 1) // 2
    positions = _normal(g, length + spare, width, dtype=dtype)
    positions[length:] = torch.nan
    arguments = {
        "frames": _normal(g, blocks, frames, bins),
        "weight1": _normal(g, width, bins, 3, dtype=dtype, scale=(3 * bins) ** -0.5),
        "bias1": _normal(g, width, dtype=dtype),
        "weight2": _normal(g, width, width, 3, dtype=dtype, scale=(3 * width) ** -0.5),
        "bias2": _normal(g, width, dtype=dtype),
        "positions": positions,
    }
    return Case(arguments)


def layer_norm_case(
    g: Generator,
    *,
    rows: int = 5,
    width: int = 64,
    offset: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`scale`: the standard deviation of the rows; `offset`: their mean, in standard deviations."""
    arguments = {
        "x": scale * (_normal(g, rows, width, dtype=dtype) + offset),
        "weight": _normal(g, width, dtype=dtype),
        "bias": _normal(g, width, dtype=dtype),
        "eps": 1e-5,
    }
    return Case(arguments)


def rms_norm_case(
    g: Generator,
    *,
    rows: int = 5,
    width: int = 64,
    residual: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`scale`: the root mean square of the rows."""
    arguments = {
        "x": _normal(g, rows, width, dtype=dtype, scale=scale),
        "weight": _normal(g, width, dtype=dtype),
        "eps": 1e-6,
    }
    if not residual:
        return Case({**arguments, "residual": None})
    summand = _normal(g, rows, width, dtype=dtype, scale=scale)
    return Case({**arguments, "residual": summand}, mutates=("residual",))


def linear_case(
    g: Generator,
    *,
    rows: int = 13,
    width_in: int = 64,
    width_out: int = 96,
    bias: bool = False,
    epilogue: str = "none",
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """`width_out`: rows of the weight; silu_gate makes half as many columns of them."""
    arguments: Arguments = {
        "x": _normal(g, rows, width_in, dtype=dtype),
        "weight": _normal(g, width_out, width_in, dtype=dtype, scale=width_in**-0.5),
        "epilogue": epilogue,
    }
    if bias:
        arguments["bias"] = _normal(g, width_out, dtype=dtype)
    if residual:
        made = width_out // 2 if epilogue == "silu_gate" else width_out
        arguments["residual"] = _normal(g, rows, made, dtype=dtype)
    return Case(arguments)


def linear_quantised_case(
    g: Generator, *, kind: str = "int8", width_in: int = 64, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Case:
    """As `linear_case`, its weight as kind "int8", "fp8", "int4" (groups of 32) or "int4-64" stores it."""
    arguments = linear_case(g, width_in=width_in, dtype=dtype, **sizes).arguments
    weight = arguments.pop("weight")
    if kind.startswith("int4"):
        stored = quantise_int4(weight, int(kind.partition("-")[2] or 32))
    else:
        stored = {"int8": quantise_int8, "fp8": quantise_fp8}[kind](weight)
    quantised = dict(zip(("values", "scale"), stored, strict=True))
    return Case(arguments | quantised, truth=_dequantised_product)


def _dequantised_product(arguments: Arguments) -> list[Tensor]:
    """The product in float64 with the weights that the stored ones stand for."""
    wide: Arguments = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if name not in ("values", "scale")
    }
    values, scale = arguments["values"], arguments["scale"]
    whole = dequantise_int4 if values.dtype == torch.uint8 else dequantise_int8
    return [linear_ref(**wide, weight=whole(values, scale).double())]


def rope_append_case(
    g: Generator,
    *,
    rows: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int = 16,
    page: int = 8,
    bias: bool = True,
    padded: int = 1,
    most: int = 1 << 22,
    dtype: torch.dtype = torch.float32,
    page_dtype: torch.dtype | None = None,
    scaled: bool = False,
) -> Case:
    """Positions below `most` (2^22: 35 hours of sound); `padded` rows store nothing. Pages begin as NaN.
    scaled: float8 pages.
    """
    width = (heads + 2 * kv_heads) * head_width
    pages = -(-rows // page) + 2
    slots = torch.randperm(pages * page, generator=g)[:rows]
    slots[torch.randperm(rows, generator=g)[:padded]] = -1
    shape = (pages, page, kv_heads, head_width)
    arguments = {
        "qkv": _normal(g, rows, width, dtype=dtype),
        "bias": _normal(g, width, dtype=dtype) if bias else None,
        "positions": torch.randint(most, (rows,), generator=g),
        "slots": slots,
        "inv_freq": 1e6 ** (-torch.arange(head_width // 2, dtype=torch.float64) / (head_width // 2)),
        "k_pages": torch.full(shape, torch.nan, dtype=FLOAT8 if scaled else page_dtype or dtype),
        "v_pages": torch.full(shape, torch.nan, dtype=FLOAT8 if scaled else page_dtype or dtype),
    }
    if scaled:
        arguments["kv_scale"] = _scales(g, kv_heads)
    return Case(arguments, mutates=("k_pages", "v_pages"))


def _scales(g: Generator, kv_heads: int) -> Tensor:
    """float32 [2, G], no powers of two: of keys and values of size 1."""
    return 0.02 * (1 + torch.rand(2, kv_heads, generator=g))


def block_attention_case(
    g: Generator,
    *,
    blocks: int = 2,
    positions: int = 20,
    heads: int = 2,
    head_width: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    qkv = _normal(g, blocks, positions, 3 * heads * head_width, dtype=dtype)
    return Case({"qkv": qkv, "heads": heads})


def paged_attention_case(
    g: Generator,
    *,
    rows: Sequence[int] = (13, 1),
    lens: Sequence[int] = (23, 11),
    gaps: Sequence[tuple[int, int]] = ((6, 10), (6, 8)),
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int = 16,
    page: int = 8,
    dtype: torch.dtype = torch.float32,
    page_dtype: torch.dtype | None = None,
    scaled: bool = False,
    most: int = 1 << 22,
) -> Case:
    """`rows` new rows of sequences that have `lens` slots, theirs included, of which `gaps` are empty.
    scaled: float8 pages whose keys lack a bias, sequences at positions of up to `most`.
    """
    page_dtype = FLOAT8 if scaled else page_dtype
    scale = _scales(g, kv_heads) if scaled else torch.ones(2, kv_heads)
    counts = [-(-length // page) for length in lens]
    width, pages = max(counts) + 2, sum(counts) + 2
    free = torch.randperm(pages, generator=g).tolist()
    shape = (pages, page, kv_heads, head_width)
    k_pages, v_pages = (torch.full(shape, torch.nan, dtype=page_dtype or dtype) for _ in range(2))
    table = torch.full((len(lens), width), POISON_INDEX, dtype=torch.int32)
    for b, (length, (begin, end), count) in enumerate(zip(lens, gaps, counts, strict=True)):
        owned = [free.pop() for _ in range(count)]
        table[b, :count] = _ints(owned, torch.int32)
        slot = torch.arange(count * page)
        unseen = (slot >= length) | ((slot >= begin) & (slot < end))
        for pool, size in zip((k_pages, v_pages), scale, strict=True):
            written = _normal(g, count * page, kv_heads, head_width).index_fill(
                0, unseen.nonzero()[:, 0], torch.nan
            )
            written = (written / size[:, None]).view(count, page, kv_heads, head_width)
            flat = pool.view(torch.uint8) if scaled else pool  # torch writes to places of few dtypes
            flat[owned] = written.to(pool.dtype).view(flat.dtype)
    arguments = {
        "q": _normal(g, sum(rows), heads, head_width, dtype=dtype),
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_table": table,
        "row_starts": _ints([sum(rows[:b]) for b in range(len(rows) + 1)], torch.int32),
        "kv_lens": _ints(lens, torch.int32),
        "gaps": _ints(gaps, torch.int32),
    }
    if scaled:
        arguments |= _restoring(g, rows, arguments["q"], scale, most)
    return Case(arguments)


def _restoring(g: Generator, rows: Sequence[int], q: Tensor, scale: Tensor, most: int) -> Arguments:
    """What paged_attention needs beside scaled pages. Some channels have a large bias, in 16 bits a smaller
    one, for there a key is rounded with its bias, as it is in pages of 16 bits.
    """
    heads, width = q.shape[1:]
    bias, large = _normal(g, (heads + 2 * scale.shape[1]) * width), 30.0 if q.dtype == torch.float32 else 3.0
    bias *= torch.where(torch.rand(len(bias), generator=g) < 0.1, large, 1.0)
    firsts = torch.randint(most, (len(rows),), generator=g)
    positions = [first + torch.arange(count) for first, count in zip(firsts, rows, strict=True)]
    return {
        "kv_scale": scale,
        "bias": bias.to(q.dtype),
        "positions": torch.cat(positions),
        "inv_freq": 1e6 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2)),
    }


def decide_case(
    g: Generator, *, rows: int = 12, width: int = 64, sessions: int = 3, dtype: torch.dtype = torch.float32
) -> Case:
    """Policies of every kind, among them plain argmax; states in the middle of a stream."""
    arguments: Arguments = {
        "x": _normal(g, rows, width, dtype=dtype),
        "norm_weight": _normal(g, width, dtype=dtype),
        "eps": 1e-6,
        "head": _normal(g, 2, width, dtype=dtype, scale=2 * width**-0.5),
        "slots": torch.randint(sessions, (rows,), generator=g),
        "policy": torch.stack(
            (
                torch.rand(sessions, generator=g),
                torch.rand(sessions, generator=g).round(decimals=1),
                torch.randint(4, (sessions,), generator=g).float(),
            ),
            dim=1,
        ),
        "state": torch.randint(2, (sessions, 2), generator=g, dtype=torch.int32) * _ints([7, 1], torch.int32),
    }
    arguments["policy"][0] = torch.tensor([0.5, 1.0, 0.0])
    arguments["state"][0] = _ints([2**30, 1], torch.int32)
    return Case(arguments, mutates=("state",))


def sample_case(
    g: Generator, *, rows: int = 6, vocab: int = 64, phases: int = 2, dtype: torch.dtype = torch.float32
) -> Case:
    """Greedy rows and drawn ones of every kind: plain, top-k, top-p, both."""
    kind = torch.arange(rows) % 5
    arguments: Arguments = {
        "logits": _normal(g, rows, vocab, dtype=dtype, scale=3),
        "banned": torch.rand(phases, vocab, generator=g) < 0.2,
        "phase": torch.randint(phases, (rows,), generator=g),
        "temperature": torch.where(kind == 0, 0.0, torch.rand(rows, generator=g) + 0.5),
        "top_k": torch.where((kind == 2) | (kind == 4), torch.randint(1, 2 * vocab, (rows,), generator=g), 0),
        "top_p": torch.where(kind >= 3, torch.rand(rows, generator=g), 1.0),
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g),
        "counter": torch.randint(2**40, (rows,), generator=g),
    }
    arguments["banned"][:, 0] = False
    return Case(arguments)


CASES: dict[str, Callable[[Generator], list[Case]]] = {
    "mel": lambda g: [mel_case(g)],
    "conv_stem": lambda g: [conv_stem_case(g)],
    "layer_norm": lambda g: [layer_norm_case(g)],
    "rms_norm": lambda g: [rms_norm_case(g), rms_norm_case(g, residual=True)],
    "linear": lambda g: [
        linear_case(g, bias=True),
        linear_case(g, bias=True, epilogue="gelu"),
        linear_case(g, bias=True, epilogue="silu_gate", residual=True),
    ],
    "linear_quantised": lambda g: [
        linear_quantised_case(g, kind="int8", bias=True, epilogue="silu_gate", residual=True),
        linear_quantised_case(g, kind="int8", epilogue="gelu"),
        linear_quantised_case(g, kind="int4", bias=True),
    ],
    "rope_append": lambda g: [rope_append_case(g), rope_append_case(g, bias=False)],
    "block_attention": lambda g: [block_attention_case(g)],
    "paged_attention": lambda g: [paged_attention_case(g)],
    "decide": lambda g: [decide_case(g)],
    "sample": lambda g: [sample_case(g)],
}
