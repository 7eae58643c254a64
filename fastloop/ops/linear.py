"""linear: y = epilogue(x W^T + bias) + residual, for the few rows (1..64) of a step.

The weights are the traffic: a step reads each of them once, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define
from .native import (
    FLOAT32,
    address,
    check_native,
    pack,
    packed_once,
    register_native,
    require_native,
    rows_of,
    team,
)

EPILOGUES = ("none", "gelu", "silu_gate")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None) -> int:
    """Check the contract; returns the width of the output."""
    sizes = check_dims("linear", x=(x, "N D"), weight=(weight, "O D"))
    check_floats("linear", x=x, weight=weight, bias=bias, residual=residual)
    if epilogue not in EPILOGUES:
        raise ValueError(f"linear: unknown epilogue {epilogue!r}; choose from {EPILOGUES}")
    if bias is not None:
        check_dims("linear", weight=(weight, "O D"), bias=(bias, "O"))
    if epilogue == "silu_gate" and sizes["O"] % 2:
        raise ValueError(f"linear: silu_gate needs [gate; up] rows, an even number; got {sizes['O']}")
    width = sizes["O"] // 2 if epilogue == "silu_gate" else sizes["O"]
    if residual is not None and tuple(residual.shape) != (sizes["N"], width):
        raise ValueError(f"linear: residual is {tuple(residual.shape)}, the output {(sizes['N'], width)}")
    return width


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """x [N, D], weight [O, D], bias [O], residual [N, O'] -> y [N, O'] in x's dtype.

    epilogue: "none" and "gelu" (exact, erf) keep O' = O; "silu_gate" takes weight rows [gate; up] and
    returns silu(gate) * up with O' = O / 2.
    """
    _check(x, weight, bias, epilogue, residual)
    y = F.linear(x, weight, bias)
    if epilogue == "gelu":
        y = F.gelu(y)
    elif epilogue == "silu_gate":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], _check(x, weight, bias, epilogue, residual))


linear = define(linear_ref, _fake)


def linear_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """`linear_ref` in C++ (csrc/cpu/linear.cpp), float32, any number of rows, on up to torch's threads.

    The weight is packed at its first use and kept packed (`packed_once`). Packed weights of other precisions
    go through `linear_packed`.
    """
    width = _check(x, weight, bias, epilogue, residual)
    check_native("linear", x=x, weight=weight, bias=bias, residual=residual)
    gated = epilogue == "silu_gate"
    packed = packed_once(weight, "gated" if gated else "plain", lambda w: pack(w, gated=gated))
    return linear_packed(x, packed, width, bias, epilogue, residual, isa)


def linear_packed(
    x: Tensor,
    packed: Any,
    width: int,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """The product with a weight of `native.pack`, whose result is `width` wide; all tensors float32."""
    x = rows_of(x)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    out = x.new_empty(x.shape[0], width)
    require_native().linear(
        weight=packed,
        team=team(),
        rows=x.shape[0],
        x=address(x),
        x_stride=x.stride(0),
        bias=address(bias),
        epilogue=EPILOGUES.index(epilogue) % 2,  # the gate belongs to the packed weight
        residual=address(residual),
        residual_stride=0 if residual is None else residual.stride(0),
        out=address(out),
        out_stride=out.stride(0),
        isa=isa,
    )
    return out


register_native(linear, linear_cpu, takes={"x": FLOAT32}, default=False)


def linear_bytes(
    rows: int, width_in: int, width_out: int, itemsize: int = 4, weight_itemsize: float = 4
) -> int:
    """Bytes moved: the weights once, the rows in and out."""
    return int(width_in * width_out * weight_itemsize) + rows * (width_in + width_out) * itemsize


def linear_flops(rows: int, width_in: int, width_out: int) -> int:
    """Multiplications and additions."""
    return 2 * rows * width_in * width_out
