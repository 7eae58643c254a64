"""What several kernels share on the device."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """First line of every kernel. Under programmatic dependent launch: let the next kernel's blocks be
    scheduled, then wait until what the previous kernel wrote is there.
    """
    begin_early(DEPENDENT)
    begin_late(DEPENDENT)


@triton.jit
def begin_early(DEPENDENT: tl.constexpr):
    """The first half: for kernels that have something to do before they need what the previous one wrote."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin_late(DEPENDENT: tl.constexpr):
    """The second half: nothing that the previous kernel wrote is read before."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(address, mask):
    """Ask the L2 cache for the line at each address. A hint: what is read later is what memory holds then,
    whoever wrote it meanwhile.
    """
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [address.to(tl.uint64, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def dot(a, b, acc):
    """acc [M, N] float32 + a [M, K] b [K, N]; float32 operands are multiplied as such (no TF32), and their K
    products are summed apart: in one chain with all that acc has, sums of a thousand lose twice the bits.
    """
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16; products of floats are exact
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:  # the last option keeps the compiler from making one chain of the two
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_once(a, b):
    """a [M, K] b [K, N] in float32, as `dot`; float32 operands are summed in chains of 32 products."""
    M: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1]
    N: tl.constexpr = b.shape[1]
    if a.dtype == tl.float32 and K > 32:
        parts = tl.permute(tl.reshape(a, (M, K // 32, 32)), (1, 0, 2))
        made = tl.sum(tl.dot(parts, tl.reshape(b, (K // 32, 32, N)), input_precision="ieee"), 0)
    else:
        made = dot(a, b, tl.zeros((M, N), tl.float32))
    return made


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x rounded to nearest, ties to even, in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter cuts the last 16 bits off
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(DTYPE)


@triton.jit
def float8(x):
    """float32 x in float8_e4m3fn; what is too large becomes the largest, what is not finite NaN."""
    inside = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if INTERPRETED:  # the interpreter cuts the last bits off; below 2^-6 steps are of 2^-9
        bits = inside.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        inside = tl.where(tl.abs(x) < 0.015625, (inside + 24576.0) - 24576.0, rounded)
        made = inside.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # ...and knows no NaN
        made = tl.where(tl.abs(x) < float("inf"), made, 0x7F).to(tl.uint8)
        return made.to(tl.float8e4nv, bitcast=True)
    else:
        return tl.where(tl.abs(x) < float("inf"), inside, float("nan")).to(tl.float8e4nv)


@triton.jit
def widen(x):
    """x in float32."""
    wide = x.to(tl.float32)
    if INTERPRETED and x.dtype == tl.float8e4nv:  # the interpreter takes its NaN for 480
        wide = tl.where((x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), wide)
    return wide


@triton.jit
def rsqrt(x):
    """1 / sqrt(x), both rounded to nearest: a whole row is scaled by it, so an error of its is the row's."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def gelu(x):
    """x Phi(x), exact (erf)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x / (1.0 + tl.exp2(x * -LOG2_E))
