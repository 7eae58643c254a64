"""rms_norm: y = x / sqrt(mean(x^2) + eps) weight; with a residual: residual += x, y = norm(residual).

Who owns what: one program one row, all of it in registers. Bytes moved: the row in and out, the residual in
and out. The normed row is rounded to x's dtype before it is weighted, and the sum before it is normed, as in
Qwen2.5: the same bits as the definition up to the order of one sum.
Why this version: see layer_norm; the residual rides along, so the sum is never read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.native import check_in_place
from ..ops.rms_norm import _check as check_rms_norm
from .device import begin, narrow, rsqrt
from .launch import accept, launch, rows_apart
from .tuning import choose


@triton.jit
def _rms_norm(
    x, weight, residual, y, width, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        kept = residual + row * residual_stride + column
        value += tl.load(kept, mask=inside, other=0.0).to(tl.float32)
        total = narrow(value, residual.dtype.element_ty)
        tl.store(kept, total, mask=inside)
        value = total.to(tl.float32)
    scale = rsqrt(tl.sum(value * value, 0) / width + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = narrow(value * scale, y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + column, narrow(normed * gain, y.dtype.element_ty), mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`rms_norm_ref` on a GPU: x [N, D], weight [D], residual [N, D] (+= x, in place) -> y [N, D]."""
    check_rms_norm(x, weight, residual)
    accept("rms_norm", x=x, weight=weight, residual=residual)
    x, weight, residual_stride = rows_apart(x), weight.contiguous(), 0
    rows, width = x.shape
    if residual is not None:
        if residual.stride(1) != 1 and width > 1:
            check_in_place("rms_norm", "residual", residual)
        residual_stride = residual.stride(0)
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    config = choose("rms_norm", x.device, rows=rows, width=width)
    block = triton.next_power_of_2(width)
    launch(
        _rms_norm, (rows,), x, weight, residual, y, width, x.stride(0), residual_stride, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, **config,
    )  # fmt: skip
    return y
