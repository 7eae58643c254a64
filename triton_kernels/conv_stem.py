"""conv_stem: conv k3 p1, GELU, conv k3 stride 2 p1, GELU, + positions; frames [B, F, C] -> [B, (F+1)/2, E].

    _first_conv   h[b, f, e] = gelu(bias1[e] + sum_cj weight1[e, c, j] frames[b, f + j - 1, c]), written as
                  the second one reads it: row (b, t) holds h[b, 2 t + j - 1, c] at 3 c + j, zero outside
    linear        the second convolution is then a product with weight2 [E, 3 E] as it lies in memory, with
                  GELU and the positions as its residual

Who owns what: a program of _first_conv owns BLOCK_OUT channels of BLOCK_ROWS of the (b, t, j); the rest is
linear's. Bytes moved: both weights once (1 MB and 9.8 MB in bfloat16 at 3B dims: the second one is the
traffic), frames, and 3 E numbers for each position out and in through L2.
Why this version: the taps lie innermost in both weights, so a product over (channel, tap) streams them in
order, and only the small input is gathered. Frames at an odd place are computed twice (a first convolution
1.5 times as large, 5 % of the arithmetic), so that every number of a row has one writer, zeros included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.conv_stem import _check as check_conv_stem
from .device import begin, dot, gelu, narrow
from .launch import accept, launch
from .linear import run_linear
from .tuning import choose


@triton.jit(do_not_specialize=["rows", "frame_count", "positions"])
def _first_conv(
    frames, weight, bias, hidden, rows, frame_count, positions, width, depth,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """rows: B T 3, of (block, position, tap of the second convolution); depth: 3 C."""
    begin(DEPENDENT)
    bins = depth // 3
    channel = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask, there = channel < width, row < rows
    place, tap = row // 3, row % 3
    block, frame = place // positions, place % positions * 2 + tap - 1
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        d = start + tl.arange(0, BLOCK_DEPTH)
        source = frame[None, :] + (d % 3)[:, None] - 1
        inside = (d < depth)[:, None] & there[None, :] & (source >= 0) & (source < frame_count)
        at = (block.to(tl.int64) * frame_count)[None, :] + source
        x = tl.load(frames + at * bins + (d // 3)[:, None], mask=inside, other=0.0)
        w = tl.load(
            weight + channel.to(tl.int64)[:, None] * depth + d[None, :],
            mask=mask[:, None] & (d < depth)[None, :],
            other=0.0,
        )
        acc = dot(w, narrow(x.to(tl.float32), weight.dtype.element_ty), acc)
    acc = gelu(acc + tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[:, None])
    acc = tl.where(((frame >= 0) & (frame < frame_count))[None, :], acc, 0.0)
    to = hidden + (place.to(tl.int64) * (3 * width) + tap)[None, :] + 3 * channel[:, None]
    tl.store(to, narrow(acc, hidden.dtype.element_ty), mask=mask[:, None] & there[None, :])


def conv_stem_triton(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> Tensor:
    """`conv_stem_ref` on a GPU: frames [B, F, C], weight1 [E, C, 3], weight2 [E, E, 3], biases [E],
    positions [T >= (F+1)/2, E] -> [B, (F+1)/2, E] in the weights' dtype.
    """
    count = check_conv_stem(frames, weight1, bias1, weight2, bias2, positions)
    accept("conv_stem", frames=frames, weight1=weight1, weight2=weight2, bias2=bias2, positions=positions)
    blocks, length, bins = frames.shape
    width, depth = weight1.shape[0], 3 * bins
    frames, weight1, weight2 = frames.contiguous(), weight1.contiguous(), weight2.contiguous()
    hidden = torch.empty((blocks * count, 3 * width), dtype=weight1.dtype, device=frames.device)
    config = choose("conv_stem", frames.device, itemsize=weight1.element_size(), rows=3 * blocks * count)
    grid = (
        triton.cdiv(width, config["BLOCK_OUT"]),
        triton.cdiv(3 * blocks * count, config["BLOCK_ROWS"]),
    )
    launch(
        _first_conv, grid, frames, weight1, bias1.contiguous(), hidden, 3 * blocks * count, length, count,
        width, depth, **config,
    )  # fmt: skip
    second = weight2.view(width, 3 * width)
    return run_linear(hidden, second, None, bias2, "gelu", positions[:count]).view(blocks, count, width)
