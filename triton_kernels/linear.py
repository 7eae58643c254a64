"""linear: y = epilogue(x W^T + bias) + residual, for the few rows of a step.

    _linear   acc[o, n] = sum_d W[o, d] x[n, d]      the weights are the left operand: 13 rows sit in n = 16
    _finish   the epilogue; with split depth, after the sum over the splits in their order

Who owns what: a program owns CHANNELS output channels (for silu_gate the gate and the up rows of those) for
BLOCK_ROWS rows, over one of SPLITS ranges of the depth. CHANNELS is BLOCK_OUT, or what deals them out evenly:
11,008 channels in tiles of 32 are 2.6 tiles for each of 132 processors, in tiles of 28 they are 3. Bytes
moved: the weights once, streamed past the cache (evict_first), x once per program out of L2.
Why this version: at 1 to 64 rows the weights are the traffic (88 % of a layer's bytes), so every weight byte
is in flight once, several stages deep, and the multiply hides behind it. Few output channels leave processors
idle: then the depth is split, partial sums go through L2 in float32, and a second kernel adds them in a fixed
order, so that a result does not depend on which block came last and no counter is shared between streams.
What was tried in whole steps on an H100 and is not here (bench/GPU.md): norming x in every program that
reads it, 6 % slower (the encoder 43 %), for all of them repeat the arithmetic; norming the result in the
pass that adds the splits, as fast (the encoder 9 % slower), for there are fewer rows than tiles to share it;
asking L2 for the next weights in a branch of the graph, as fast at best.

The same kernels read quantised weights (triton_kernels/linear_quantised.py), widened to x's dtype.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.linear import _check as check_linear
from .device import begin, begin_early, begin_late, dot, gelu, narrow, prefetch, silu
from .launch import accept, launch, processors, rows_apart
from .tuning import choose

LINE_BYTES = tl.constexpr(128)  # of L2
OUT_GROUP = tl.constexpr(8)  # neighbouring programs share x tiles of so many output tiles
PREFETCH_KB = 16  # of a program, where the table says nothing else; 64 were slower, 0 too (bench/GPU.md)
LEAST_STEPS = 4  # of a split: below that, filling the pipeline takes longer than what it streams


@triton.jit
def _tile(
    weight, scale, channel, mask, column, inside, depth, X: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_OUT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows `channel` of the weights at `column`, in x's dtype. int4: (even, odd inputs), else two equal."""
    other = 0.0 if weight.dtype.element_ty.is_floating() else 0
    place = weight + channel.to(tl.int64)[:, None] * depth + column[None, :]
    raw = tl.load(place, mask=mask[:, None] & inside[None, :], other=other, eviction_policy="evict_first")
    if FORMAT == "int4":
        BYTES: tl.constexpr = GROUP // 2  # of a group
        GROUPS: tl.constexpr = COLUMNS // BYTES
        group = tl.min(column, 0) // BYTES + tl.arange(0, GROUPS)
        place = scale + channel[:, None] * (depth // BYTES) + group[None, :]
        valid = mask[:, None] & (group < depth // BYTES)[None, :]
        factor = tl.load(place, mask=valid, other=0.0).to(tl.float32)[:, :, None]
        low = tl.reshape((raw & 15).to(tl.float32) - 8.0, (BLOCK_OUT, GROUPS, BYTES)) * factor
        high = tl.reshape((raw >> 4).to(tl.float32) - 8.0, (BLOCK_OUT, GROUPS, BYTES)) * factor
        first = narrow(tl.reshape(low, (BLOCK_OUT, COLUMNS)), X)
        second = narrow(tl.reshape(high, (BLOCK_OUT, COLUMNS)), X)
    elif FORMAT == "scaled":
        first = narrow(raw.to(tl.float32), X)
        second = first
    else:
        first = raw.to(X)
        second = first
    return first, second


@triton.jit
def _ask(weight, channel, mask, begin_column, last, depth, PREFETCH: tl.constexpr):
    """Have L2 load the first PREFETCH columns of the rows `channel`, as far as `last`."""
    LINE: tl.constexpr = LINE_BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth
    column = begin_column + tl.arange(0, PREFETCH // LINE) * LINE
    there = mask[:, None] & (column < last)[None, :]
    prefetch(weight + channel.to(tl.int64)[:, None] * depth + column[None, :], there)


@triton.jit
def _inputs(
    x, row, there, column, inside, x_stride, FORMAT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """x at the inputs of the weights' columns, [inputs, rows]. int4: (even, odd), else two equal."""
    if FORMAT == "int4":
        d = 2 * tl.min(column, 0) + tl.arange(0, 2 * COLUMNS)
        both = there[:, None] & (d < 2 * (tl.max(tl.where(inside, column, -1), 0) + 1))[None, :]
        place = x + row.to(tl.int64)[:, None] * x_stride + d[None, :]
        pairs = tl.load(place, mask=both, other=0.0, eviction_policy="evict_last")
        even, odd = tl.split(tl.reshape(pairs, (BLOCK_ROWS, COLUMNS, 2)))
        first, second = tl.trans(even), tl.trans(odd)
    else:
        place = x + row.to(tl.int64)[None, :] * x_stride + column[:, None]
        both = inside[:, None] & there[None, :]
        first = tl.load(place, mask=both, other=0.0, eviction_policy="evict_last")
        second = first
    return first, second


@triton.jit
def _finish(
    acc, up, scale, bias, residual, y, channel, mask, row, there, width, residual_stride, period,
    EPILOGUE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store epilogue(acc) [channels, rows]; `up` is the second half of a gate, else unused. The residual of a
    row is row % period.
    """
    GATE: tl.constexpr = EPILOGUE == "silu_gate"
    if HAS_SCALE:
        acc *= tl.load(scale + channel, mask=mask, other=0.0)[:, None]
        if GATE:
            up *= tl.load(scale + width + channel, mask=mask, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[:, None]
        if GATE:
            up += tl.load(bias + width + channel, mask=mask, other=0.0).to(tl.float32)[:, None]
    if GATE:
        acc = silu(acc) * up
    elif EPILOGUE == "gelu":
        acc = gelu(acc)
    both = mask[:, None] & there[None, :]
    if HAS_RESIDUAL:
        old = residual + (row % period).to(tl.int64)[None, :] * residual_stride + channel[:, None]
        acc += tl.load(old, mask=both, other=0.0).to(tl.float32)
    tl.store(
        y + row.to(tl.int64)[None, :] * width + channel[:, None], narrow(acc, y.dtype.element_ty), mask=both
    )


@triton.jit(do_not_specialize=["rows", "period"])
def _linear(
    x, weight, scale, bias, residual, y, partial, rows, width, depth, x_stride, residual_stride, period,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, EPILOGUE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, SPLITS: tl.constexpr, PREFETCH: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """depth: of a stored weight row (bytes for int4); width: output channels; PREFETCH: columns of each
    weight row that L2 is asked for while the kernel in front runs on.
    """
    tl.static_assert(CHANNELS <= BLOCK_OUT)
    begin_early(DEPENDENT)
    GATE: tl.constexpr = EPILOGUE == "silu_gate"
    X: tl.constexpr = x.dtype.element_ty
    COLUMNS: tl.constexpr = BLOCK_DEPTH // 2 if FORMAT == "int4" else BLOCK_DEPTH  # stored in a step
    row_tiles, out_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(width, CHANNELS)
    tile, split = tl.program_id(0), tl.program_id(1)
    first = tile // (OUT_GROUP * row_tiles) * OUT_GROUP
    within = tl.minimum(out_tiles - first, OUT_GROUP)
    out_tile = first + tile % (OUT_GROUP * row_tiles) % within
    row_tile = tile % (OUT_GROUP * row_tiles) // within
    own = tl.arange(0, BLOCK_OUT)
    channel = out_tile * CHANNELS + own
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask, there = (own < CHANNELS) & (channel < width), row < rows

    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    up = acc
    steps = tl.cdiv(tl.cdiv(depth, COLUMNS), SPLITS)
    last = tl.minimum(depth, (split + 1) * steps * COLUMNS)
    if DEPENDENT and PREFETCH > 0:
        start = split * steps * COLUMNS
        _ask(weight, channel, mask, start, last, depth, PREFETCH)
        if GATE:
            _ask(weight, width + channel, mask, start, last, depth, PREFETCH)
    begin_late(DEPENDENT)
    for begin_column in range(split * steps * COLUMNS, last, COLUMNS):
        column = begin_column + tl.arange(0, COLUMNS)
        inside = column < depth
        x_low, x_high = _inputs(x, row, there, column, inside, x_stride, FORMAT, BLOCK_ROWS, COLUMNS)
        low, high = _tile(
            weight, scale, channel, mask, column, inside, depth, X, FORMAT, GROUP, BLOCK_OUT, COLUMNS
        )  # fmt: skip
        acc = dot(low, x_low, acc)
        if FORMAT == "int4":
            acc = dot(high, x_high, acc)
        if GATE:
            low, high = _tile(
                weight, scale, width + channel, mask, column, inside, depth, X, FORMAT, GROUP, BLOCK_OUT,
                COLUMNS,
            )  # fmt: skip
            up = dot(low, x_low, up)
            if FORMAT == "int4":
                up = dot(high, x_high, up)

    if SPLITS == 1:
        _finish(
            acc, up, scale, bias, residual, y, channel, mask, row, there, width, residual_stride, period,
            EPILOGUE, FORMAT == "scaled", HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        stored: tl.constexpr = 2 if GATE else 1
        place = partial + (split * rows + row).to(tl.int64)[None, :] * (stored * width) + channel[:, None]
        both = mask[:, None] & there[None, :]
        tl.store(place, acc, mask=both)
        if GATE:
            tl.store(place + width, up, mask=both)


@triton.jit(do_not_specialize=["rows", "period"])
def _add_splits(
    partial, scale, bias, residual, y, rows, width, residual_stride, period,
    EPILOGUE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The sum over the splits, first to last, then the epilogue."""
    begin(DEPENDENT)
    GATE: tl.constexpr = EPILOGUE == "silu_gate"
    stored: tl.constexpr = 2 if GATE else 1
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask, there = channel < width, row < rows
    both = mask[:, None] & there[None, :]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    up = acc
    for split in tl.static_range(SPLITS):
        place = partial + (split * rows + row).to(tl.int64)[None, :] * (stored * width) + channel[:, None]
        acc += tl.load(place, mask=both, other=0.0)
        if GATE:
            up += tl.load(place + width, mask=both, other=0.0)
    _finish(
        acc, up, scale, bias, residual, y, channel, mask, row, there, width, residual_stride, period,
        EPILOGUE, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def depth_splits(tiles: int, steps: int, processors: int, most: int) -> int:
    """Into how many ranges to split the depth: two blocks for every processor, so that one loads while the
    other one drains, but no split shorter than LEAST_STEPS. 32 tiles of the out projection on 132 processors:
    16 steps of 128 inputs allow 4 splits, 128 blocks.
    """
    wanted = -(-2 * processors // max(tiles, 1))
    return max(1, min(wanted, steps // LEAST_STEPS, most))


def prefetched(kilobytes: int, weight: Tensor, block_out: int, gate: bool) -> int:
    """Columns of each of a program's weight rows that make so many kilobytes: whole lines, a power of two."""
    columns = 1024 * kilobytes // (weight.element_size() * block_out * (1 + gate))
    return columns if columns * weight.element_size() >= LINE_BYTES.value else 0


def run_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, epilogue: str,
    residual: Tensor | None, weights: str = "plain", group: int = 1,
) -> Tensor:  # fmt: skip
    """weights: "plain", "scaled" (one scale a channel) or "int4". The residual's rows repeat."""
    rows, depth = x.shape[0], weight.shape[1]
    width = weight.shape[0] // 2 if epilogue == "silu_gate" else weight.shape[0]
    x, weight = rows_apart(x), weight.contiguous()
    scale, bias = (t if t is None else t.contiguous() for t in (scale, bias))
    residual = residual if residual is None else rows_apart(residual)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    op = "linear" if weights == "plain" else "linear_quantised"
    config = dict(
        choose(
            op, x.device, rows=rows, width_in=x.shape[1], width_out=weight.shape[0], epilogue=epilogue,
            weight=str(weight.dtype).removeprefix("torch."),
        )
    )  # fmt: skip
    block_out, block_rows, most = config["BLOCK_OUT"], config["BLOCK_ROWS"], config.pop("max_splits")
    channels = config.pop("channels", block_out)
    ahead = prefetched(config.pop("prefetch_kb", PREFETCH_KB), weight, block_out, epilogue == "silu_gate")
    tiles = triton.cdiv(rows, block_rows) * triton.cdiv(width, channels)
    steps = triton.cdiv(x.shape[1], config["BLOCK_DEPTH"])
    splits = depth_splits(tiles, steps, processors(x.device), most)
    stride, period = (0, 1) if residual is None else (residual.stride(0), max(residual.shape[0], 1))
    finish = {"EPILOGUE": epilogue, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    partial = None
    if splits > 1:
        partial = torch.empty((splits, rows, weight.shape[0]), dtype=torch.float32, device=x.device)
    launch(
        _linear, (tiles, splits), x, weight, scale, bias, residual, y, partial, rows, width, depth,
        x.stride(0), stride, period, FORMAT=weights, GROUP=group, SPLITS=splits, PREFETCH=ahead,
        CHANNELS=channels, **finish, **config,
    )  # fmt: skip
    if partial is not None:
        block = (min(128, triton.next_power_of_2(width)), min(4, triton.next_power_of_2(rows)))
        launch(
            _add_splits, (triton.cdiv(width, block[0]), triton.cdiv(rows, block[1])), partial, scale, bias,
            residual, y, rows, width, stride, period, HAS_SCALE=weights == "scaled", SPLITS=splits,
            BLOCK_OUT=block[0], BLOCK_ROWS=block[1], **finish,
        )  # fmt: skip
    return y


def linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """`linear_ref` on a GPU: x [N, D], weight [O, D], bias [O], residual [N, O'] -> y [N, O'] in x's dtype.

    Sums and epilogue are in float32 and rounded once. Any N; made for 1 to 64 rows.
    """
    check_linear(x, weight, bias, epilogue, residual)
    accept("linear", x=x, weight=weight, bias=bias, residual=residual)
    return run_linear(x, weight, None, bias, epilogue, residual)
