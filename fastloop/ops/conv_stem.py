"""conv_stem: mel frames -> encoder positions: conv k3 p1, GELU, conv k3 stride 2 p1, GELU, + positions.

Source: Whisper (Radford et al. 2022, arXiv 2212.04356), as in Qwen2.5-Omni's audio tower. Positions
start at 0 in every block, so a block needs nothing but its own frames.
"""

from __future__ import annotations

from typing import Any

import torch
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
    team,
)


def _check(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> int:
    """Check the contract; returns the number of positions that the frames give."""
    sizes = check_dims(
        "conv_stem",
        frames=(frames, "B F C"),
        weight1=(weight1, "E C 3"),
        bias1=(bias1, "E"),
        weight2=(weight2, "E E 3"),
        bias2=(bias2, "E"),
        positions=(positions, "T E"),
    )
    check_floats("conv_stem", frames=frames)
    check_floats("conv_stem", weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2, positions=positions)
    length = (sizes["F"] + 1) // 2
    if sizes["T"] < length:
        raise ValueError(
            f"conv_stem: dimension T of positions is {sizes['T']}, the {sizes['F']} frames need {length}"
        )
    return length


def conv_stem_ref(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> Tensor:
    """frames [B, F, C] of any floating dtype, weight1 [E, C, 3], weight2 [E, E, 3], biases [E],
    positions [T >= (F+1)/2, E] -> [B, (F+1)/2, E] in the weights' dtype.
    """
    length = _check(frames, weight1, bias1, weight2, bias2, positions)
    x = frames.to(weight1.dtype)
    if x.is_cuda and x.dtype == torch.float32:
        x = F.gelu(_conv_by_taps(x, weight1, bias1))
        return F.gelu(_conv_by_taps(x, weight2, bias2, stride=2)) + positions[:length]
    x = F.gelu(F.conv1d(x.mT, weight1, bias1, padding=1))
    x = F.gelu(F.conv1d(x, weight2, bias2, stride=2, padding=1))
    return x.mT.contiguous() + positions[:length]


def _conv_by_taps(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """x [B, F, C], weight [E, C, 3] -> [B, ceil(F / stride), E], a product for each tap: cuDNN multiplies
    float32 as TF32, 10 bits of it, unless a switch of the whole process forbids it; torch's products do not.
    """
    padded, last = F.pad(x, (0, 0, 1, 1)), (x.shape[1] - 1) // stride * stride
    first, middle, end = (padded[:, tap : tap + last + 1 : stride] @ weight[:, :, tap].T for tap in range(3))
    return first + middle + end + bias


def _fake(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> Tensor:
    batch, length, _ = frames.shape
    return weight1.new_empty(batch, (length + 1) // 2, weight1.shape[0])


conv_stem = define(conv_stem_ref, _fake)


def _pack(weight: Tensor) -> Any:
    """[E, C, 3] -> inputs in the order (tap, channel)."""
    return pack(weight.mT.reshape(len(weight), -1))


def conv_stem_cpu(
    frames: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    positions: Tensor,
    isa: str | None = None,
) -> Tensor:
    """`conv_stem_ref` in C++ (csrc/cpu/conv_stem.cpp), float32, on up to torch's threads.

    The weights are packed at their first use and kept packed.
    """
    length = _check(frames, weight1, bias1, weight2, bias2, positions)
    check_native("conv_stem", frames=frames, weight1=weight1, bias1=bias1)
    check_native("conv_stem", weight2=weight2, bias2=bias2, positions=positions)
    frames, positions = frames.contiguous(), positions.contiguous()
    bias1, bias2 = bias1.contiguous(), bias2.contiguous()
    blocks, count, bins = frames.shape
    out = frames.new_empty(blocks, length, len(weight1))
    require_native().conv_stem(
        team=team(),
        blocks=blocks,
        frames=count,
        bins=bins,
        width=len(weight1),
        mel=address(frames),
        conv1=packed_once(weight1, "conv", _pack),
        conv1_bias=address(bias1),
        conv2=packed_once(weight2, "conv", _pack),
        conv2_bias=address(bias2),
        positions=address(positions),
        out=address(out),
        isa=isa,
    )
    return out


register_native(conv_stem, conv_stem_cpu, takes={"frames": FLOAT32, "weight1": FLOAT32}, default=False)


def conv_stem_bytes(batch: int, frames: int, bins: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: both kernels once, frames in, positions out."""
    weights = 3 * width * (bins + width)
    return (weights + batch * (frames * bins + (frames + 1) // 2 * width)) * itemsize
