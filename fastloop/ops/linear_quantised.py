"""linear_quantised: y = epilogue(x W^T + bias) + residual with W in 8 or 4 bits; x stays what it is.

    int8, float8_e4m3fn   W[o, d] = values[o, d] scale[o]                     scale float32 [O]
    int4                  W[o, d] = (nibble[o, d] - 8) scale[o, d / group]    scale bfloat16 [O, D / group]

The weights are the traffic of a step with few rows: 8 bits halve its floor, 4 bits quarter it. Two inputs of
int4 share a byte, the even one in the low bits (fastloop.quantise). Sources: LLM.int8() (Dettmers et al.
2022, arXiv 2208.07339); FP8 formats (Micikevicius et al. 2022, arXiv 2209.05433); GPTQ's groups (Frantar et
al. 2022, arXiv 2210.17323).

`linear_kept` is what a model calls: `linear` or this op, by how the matrix is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantise import GROUPS, Quantised, dequantise_int4, dequantise_int8
from .contract import check_dims, check_floats
from .dispatch import define
from .linear import EPILOGUES, linear, linear_ref

CHANNEL_KINDS = (torch.int8, torch.float8_e4m3fn)  # one scale for each channel


def group_of(values: Tensor, scale: Tensor) -> int:
    """Inputs that share a scale: 0 where a channel has one. TypeError, ValueError where they do not fit."""
    if values.dtype not in (*CHANNEL_KINDS, torch.uint8):
        raise TypeError(
            "linear_quantised: values must be torch.int8, torch.float8_e4m3fn (a scale for each channel) or "
            f"torch.uint8 (two int4 in a byte), got {values.dtype}"
        )
    packed = values.dtype == torch.uint8
    wanted = torch.bfloat16 if packed else torch.float32
    if scale.dtype != wanted:
        raise TypeError(
            f"linear_quantised: scale of {values.dtype} values must be {wanted}, got {scale.dtype}"
        )
    if values.dim() == 2 and not packed and scale.shape == values.shape[:1]:
        return 0
    if values.dim() == scale.dim() == 2 and packed and len(scale) == len(values):
        for group in GROUPS:
            if 2 * values.shape[1] == group * scale.shape[1] and scale.shape[1]:
                return group
    raise ValueError(
        f"linear_quantised: scale {list(scale.shape)} does not fit {values.dtype} values "
        f"{list(values.shape)}: one scale a channel, or with int4 one for each group of it ({GROUPS} inputs)"
    )


def check_quantised(
    x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
) -> tuple[int, int]:
    """Check the contract; returns the group (`group_of`) and the width of the output."""
    op, group = "linear_quantised", group_of(values, scale)
    inputs = values.shape[1] * (2 if group else 1)
    meant = torch.empty(len(values), inputs, device="meta")  # what the values stand for
    sizes = check_dims(op, values=(meant, "O D"), x=(x, "N D"))
    check_floats(op, x=x, bias=bias, residual=residual)
    if epilogue not in EPILOGUES:
        raise ValueError(f"{op}: unknown epilogue {epilogue!r}; choose from {EPILOGUES}")
    if bias is not None:
        check_dims(op, values=(meant, "O D"), bias=(bias, "O"))
    if epilogue == "silu_gate" and sizes["O"] % 2:
        raise ValueError(f"{op}: silu_gate needs [gate; up] rows, an even number; got {sizes['O']}")
    width = sizes["O"] // 2 if epilogue == "silu_gate" else sizes["O"]
    if residual is not None and tuple(residual.shape) != (sizes["N"], width):
        raise ValueError(f"{op}: residual is {tuple(residual.shape)}, the output {(sizes['N'], width)}")
    return group, width


def linear_quantised_ref(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """x [N, D], values int8 or float8_e4m3fn [O, D] with scale float32 [O], or uint8 [O, D / 2] with scale
    bfloat16 [O, D / group], bias [O], residual [N, O'] -> y [N, O'] in x's dtype; epilogue as in `linear`.
    """
    group, _ = check_quantised(x, values, scale, bias, epilogue, residual)
    weight = dequantise_int4(values, scale) if group else dequantise_int8(values, scale)
    return linear_ref(x, weight.to(x.dtype), bias, epilogue, residual)


def _fake(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], check_quantised(x, values, scale, bias, epilogue, residual)[1])


linear_quantised = define(linear_quantised_ref, _fake)
linear_quantised.unavailable["cpu"] = (
    "the native kernels round the activations to int8, too, and run inside whole passes (fastloop.engine)"
)


def linear_kept(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None = None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """x [N, D], weight [O, D] of floats or quantised, bias [O], residual [N, O'] -> y [N, O'] (`linear`)."""
    if isinstance(weight, Quantised):
        return linear_quantised(x, weight.values, weight.scale, bias, epilogue, residual)
    return linear(x, weight, bias, epilogue, residual)


def linear_quantised_bytes(
    rows: int, width_in: int, width_out: int, itemsize: int = 2, weight_bits: float = 8, group: int = 0
) -> int:
    """Bytes moved: the weights and their scales once, the rows in and out."""
    scales = width_out * (width_in // group * 2 if group else 4)
    return int(width_in * width_out * weight_bits / 8) + scales + rows * (width_in + width_out) * itemsize
