"""rope_append: q, k <- R(position) (qkv + bias), and k, v into their pages.

    low' = low cos a - high sin a,  high' = high cos a + low sin a,  a = position * inv_freq

Who owns what: a program owns BLOCK_HEADS heads of one row; the angles of the row serve all of them. Bytes
moved: qkv in, q out, k and v into their pages, once each.
Why this version: after 10 million positions a float32 angle is off by half a radian, and the library's
float64 sine takes its slow path with an array on the stack. So the angle is formed in float64, as the
definition forms it, and reduced there to an eighth of a turn around the nearest quarter; what is left is a
short polynomial in float32.

Scaled pages: k leaves its bias out and is rounded once, from float32 over its head's scale to float8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.rope_append import _check as check_rope_append
from .device import begin, float8, narrow
from .launch import accept, accept_float8, launch, rows_apart
from .tuning import choose


@triton.jit
def cos_sin(angle):
    """cos and sin of float64 angles in float32, to 1e-7 whatever their size.

    The multiple of pi/2 is taken off in two parts with one rounding each. The polynomials are Taylor's on
    |r| <= pi/4; the first terms left out are r^10 / 10! = 2.5e-8 and r^11 / 11! = 1.8e-9.
    """
    nearest = tl.floor(angle * 0.6366197723675814 + 0.5)  # 2 / pi
    # Typed: `fma` of triton 3.6 takes a bare number for a float32.
    high, low = tl.full((), -1.5707963267948966, tl.float64), tl.full((), -6.123233995736766e-17, tl.float64)
    r = tl.fma(nearest, low, tl.fma(nearest, high, angle)).to(tl.float32)
    return _quarter(r, nearest.to(tl.int64) & 3)


@triton.jit
def _quarter(r, turn):
    """cos and sin of r + turn pi / 2, |r| <= pi / 4, in float32."""
    s = r * r
    cos = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    sin = r * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    swapped = (turn & 1) == 1
    flip_cos = (turn == 1) | (turn == 2)
    flip_sin = turn >= 2
    a = tl.where(swapped, sin, cos)
    b = tl.where(swapped, cos, sin)
    return tl.where(flip_cos, -a, a), tl.where(flip_sin, -b, b)


@triton.jit
def cos_sin_near(steps, frequency):
    """cos and sin of steps x frequency in float32, for whole numbers below 4,096 and float64 frequencies up
    to 1. Times the first 12 bits of the frequency they are exact, and so is what is left when multiples of
    the first 8 bits of pi / 2 are taken off.
    """
    bits = frequency.to(tl.float32).to(tl.uint32, bitcast=True)
    high = (bits & 0xFFFFF000).to(tl.float32, bitcast=True)
    low = (frequency - high.to(tl.float64)).to(tl.float32)
    count = steps.to(tl.float32)
    nearest = tl.floor(count * high * 0.63661975 + 0.5)
    r = (count * high - nearest * 1.5703125) + (count * low - nearest * 0.00048382679489661923)
    return _quarter(r, nearest.to(tl.int32) & 3)


@triton.jit
def _rope_append(
    qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale, q, row_stride, heads, groups,
    HALF: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]  # of q, then k, then v
    index = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads + 2 * groups) & (index < HALF)
    column = head * (2 * HALF) + index
    low = tl.load(qkv + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv + row * row_stride + column + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        biased = mask
        if SCALED:
            biased = mask & ((head < heads) | (head >= heads + groups))
        low += tl.load(bias + column, mask=biased, other=0.0).to(tl.float32)
        high += tl.load(bias + column + HALF, mask=biased, other=0.0).to(tl.float32)

    frequency = tl.load(inv_freq + index, mask=index < HALF, other=0.0).to(tl.float64)
    cos, sin = cos_sin(tl.load(positions + row).to(tl.float64) * frequency)
    turned_low, turned_high = low * cos - high * sin, high * cos + low * sin

    is_q = mask & (head < heads)
    to = q + row * heads * (2 * HALF) + column
    tl.store(to, narrow(turned_low, q.dtype.element_ty), mask=is_q)
    tl.store(to + HALF, narrow(turned_high, q.dtype.element_ty), mask=is_q)

    slot = tl.load(slots + row) + tl.zeros_like(head)
    kept = mask & (slot >= 0)
    is_k = kept & (head >= heads) & (head < heads + groups)
    is_v = kept & (head >= heads + groups)
    k_to = k_pages + (slot * groups + head - heads) * (2 * HALF) + index
    v_to = v_pages + (slot * groups + head - heads - groups) * (2 * HALF) + index
    if SCALED:
        scale = tl.load(kv_scale + head - heads, mask=mask & (head >= heads), other=1.0)  # keys', values'
        tl.store(k_to, float8(turned_low / scale), mask=is_k)
        tl.store(k_to + HALF, float8(turned_high / scale), mask=is_k)
        tl.store(v_to, float8(low / scale), mask=is_v)
        tl.store(v_to + HALF, float8(high / scale), mask=is_v)
    else:
        tl.store(k_to, narrow(turned_low, k_pages.dtype.element_ty), mask=is_k)
        tl.store(k_to + HALF, narrow(turned_high, k_pages.dtype.element_ty), mask=is_k)
        tl.store(v_to, narrow(low, v_pages.dtype.element_ty), mask=is_v)
        tl.store(v_to + HALF, narrow(high, v_pages.dtype.element_ty), mask=is_v)


def rope_append_triton(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """`rope_append_ref` on a GPU: qkv [N, (H + 2G) K], bias [(H + 2G) K], positions and slots int64 [N],
    inv_freq [K/2], pages [P, Q, G, K] (changed in place) -> q [N, H, K], rotated, in qkv's dtype. With
    kv_scale float32 [2, G] the pages are float8_e4m3fn (sm_89 and newer).
    """
    sizes = _checked(qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale)
    rows, groups, half = sizes["N"], sizes["G"], sizes["K/2"]
    heads = sizes["W"] // (2 * half) - 2 * groups
    qkv, positions, slots = rows_apart(qkv), positions.contiguous(), slots.contiguous()
    inv_freq = inv_freq.contiguous()
    bias, kv_scale = (t if t is None else t.contiguous() for t in (bias, kv_scale))
    q = torch.empty((rows, heads, 2 * half), dtype=qkv.dtype, device=qkv.device)
    config = dict(choose("rope_append", qkv.device, rows=rows))
    grid = (rows, triton.cdiv(heads + 2 * groups, config["BLOCK_HEADS"]))
    launch(
        _rope_append, grid, qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale, q,
        qkv.stride(0), heads, groups, HALF=half, HAS_BIAS=bias is not None, SCALED=kv_scale is not None,
        BLOCK_HALF=triton.next_power_of_2(half), **config,
    )  # fmt: skip
    return q


def _checked(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None,
) -> dict[str, int]:
    op = "rope_append"
    sizes = check_rope_append(qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale)
    pages = {"k_pages": k_pages, "v_pages": v_pages}
    if kv_scale is not None:
        pages = {name: accept_float8(op, name, pool) for name, pool in pages.items()}
    accept(op, qkv=qkv, bias=bias, positions=positions, slots=slots, kv_scale=kv_scale, **pages)
    return sizes
