"""layer_norm: y = (x - mean) / sqrt(var + eps) weight + bias.

Who owns what: one program one row, all of it in registers, so mean and variance are passes over registers
and one over memory. Bytes moved: the row in and out; weight and bias come from L2 after the first row.
Why this version: at 20 rows it is a launch, at 20,000 rows it is bandwidth; neither wants more than one row
in a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layer_norm import _check as check_layer_norm
from .device import begin, narrow, rsqrt
from .launch import accept, launch, rows_apart
from .tuning import choose


@triton.jit
def _layer_norm(x, weight, bias, y, width, x_stride, eps, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    begin(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    centred = tl.where(inside, centred - tl.sum(centred, 0) / width, 0.0)  # what rounding left in the mean
    scale = rsqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale * gain + shift
    tl.store(y + row * width + column, narrow(result, y.dtype.element_ty), mask=inside)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm_ref` on a GPU: x [N, E], weight [E], bias [E] -> y [N, E] in x's dtype."""
    check_layer_norm(x, weight, bias)
    accept("layer_norm", x=x, weight=weight, bias=bias)
    x, weight, bias = rows_apart(x), weight.contiguous(), bias.contiguous()
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    config = choose("layer_norm", x.device, rows=rows, width=width)
    block = triton.next_power_of_2(width)
    launch(_layer_norm, (rows,), x, weight, bias, y, width, x.stride(0), eps, BLOCK=block, **config)
    return y
