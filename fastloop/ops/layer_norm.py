"""layer_norm: y = (x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

Source: Ba et al. 2016, arXiv 1607.06450; the audio tower's pre-norm.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define
from .native import FLOAT32, address, check_native, register_native, require_native, rows_of


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check the contract."""
    check_dims("layer_norm", x=(x, "N E"), weight=(weight, "E"), bias=(bias, "E"))
    check_floats("layer_norm", x=x, weight=weight, bias=bias)


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [N, E], weight [E], bias [E] -> y [N, E] in x's dtype."""
    _check(x, weight, bias)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


layer_norm = define(layer_norm_ref, _fake)


def layer_norm_cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, isa: str | None = None) -> Tensor:
    """`layer_norm_ref` in C++ (csrc/cpu/layer_norm.cpp), float32."""
    _check(x, weight, bias)
    check_native("layer_norm", x=x, weight=weight, bias=bias)
    x, weight, bias = rows_of(x), weight.contiguous(), bias.contiguous()
    out = x.new_empty(x.shape)
    require_native().layer_norm(
        rows=x.shape[0],
        width=x.shape[1],
        x=address(x),
        x_stride=x.stride(0),
        weight=address(weight),
        bias=address(bias),
        eps=eps,
        out=address(out),
        out_stride=out.stride(0),
        isa=isa,
    )
    return out


register_native(layer_norm, layer_norm_cpu, takes={"x": FLOAT32}, default=False)  # torch is as fast


def layer_norm_bytes(rows: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: rows in and out, weight and bias once."""
    return (2 * rows * width + 2 * width) * itemsize
