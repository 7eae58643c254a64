"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, with an optional fused residual add.

Source: Zhang and Sennrich 2019, arXiv 1910.07467; Qwen2.5 normalises in float32 and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define
from .native import (
    FLOAT32,
    address,
    check_in_place,
    check_native,
    register_native,
    require_native,
    rows_apart,
    rows_of,
)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Check the contract."""
    check_dims("rms_norm", x=(x, "N D"), weight=(weight, "D"))
    check_floats("rms_norm", x=x, weight=weight, residual=residual)
    if residual is not None:
        check_dims("rms_norm", x=(x, "N D"), residual=(residual, "N D"))


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """x [N, D], weight [D] -> y [N, D] in x's dtype.

    With `residual` [N, D] the sum is formed first and kept: residual += x (in place), y = norm(residual).
    """
    _check(x, weight, residual)
    if residual is not None:
        x = residual.add_(x)
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


rms_norm = define(rms_norm_ref, _fake, mutates=("residual",))


def rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, isa: str | None = None
) -> Tensor:
    """`rms_norm_ref` in C++ (csrc/cpu/rms_norm.cpp), float32."""
    _check(x, weight, residual)
    check_native("rms_norm", x=x, weight=weight, residual=residual)
    if residual is not None and not rows_apart(residual):
        check_in_place("rms_norm", "residual", residual)
    x, weight = rows_of(x), weight.contiguous()
    out = x.new_empty(x.shape)
    require_native().rms_norm(
        rows=x.shape[0],
        width=x.shape[1],
        x=address(x),
        x_stride=x.stride(0),
        weight=address(weight),
        eps=eps,
        residual=address(residual),
        residual_stride=0 if residual is None else residual.stride(0),
        out=address(out),
        out_stride=out.stride(0),
        isa=isa,
    )
    return out


register_native(rms_norm, rms_norm_cpu, takes={"x": FLOAT32})


def rms_norm_bytes(rows: int, width: int, itemsize: int = 4, residual: bool = False) -> int:
    """Bytes moved: rows in and out, the weight once, the residual in and out."""
    return ((4 if residual else 2) * rows * width + width) * itemsize
