"""conv_stem: mel frames -> encoder positions: conv k3 p1, GELU, conv k3 stride 2 p1, GELU, + positions.

Source: Whisper (Radford et al. 2022, arXiv 2212.04356), as in Qwen2.5-Omni's audio tower. Positions
start at 0 in every block, so a block needs nothing but its own frames.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define


def conv_stem_ref(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> Tensor:
    """frames [B, F, C] of any floating dtype, weight1 [E, C, 3], weight2 [E, E, 3], biases [E],
    positions [T >= (F+1)/2, E] -> [B, (F+1)/2, E] in the weights' dtype.
    """
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
    x = F.gelu(F.conv1d(frames.to(weight1.dtype).mT, weight1, bias1, padding=1))
    x = F.gelu(F.conv1d(x, weight2, bias2, stride=2, padding=1))
    return x.mT.contiguous() + positions[:length]


def _fake(
    frames: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor
) -> Tensor:
    batch, length, _ = frames.shape
    return weight1.new_empty(batch, (length + 1) // 2, weight1.shape[0])


conv_stem = define(conv_stem_ref, _fake)


def conv_stem_bytes(batch: int, frames: int, bins: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: both kernels once, frames in, positions out."""
    weights = 3 * width * (bins + width)
    return (weights + batch * (frames * bins + (frames + 1) // 2 * width)) * itemsize
