"""Quantised weights: int8 and fp8 with a scale per output channel, int4 with a scale per group of inputs.

    w [O, D] -> int8   q [O, D] in -127..127,            scale float32 [O]            w ~ q scale
             -> fp8    q [O, D] float8_e4m3fn,           scale float32 [O]
             -> int4   q [O, D] in -8..7, two in a byte, scale bfloat16 [O, D / group]

Symmetric, round to nearest. The native runner rounds activations to int8 row by row inside its kernels; the
op linear_quantised leaves them as they are. Sources: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) for
the row-wise scales; FP8 formats (Micikevicius et al. 2022, arXiv 2209.05433); group-wise int4 as in GPTQ
(Frantar et al. 2022, arXiv 2210.17323) and llama.cpp's Q4_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (32, 64)
FP8_MOST = torch.finfo(torch.float8_e4m3fn).max  # 448
PIECE_VALUES = 1 << 22  # of a weight that are quantised at a time
SEARCHED = torch.linspace(0.85, 1.0, 6)  # factors of the plain int4 scale that are tried


@dataclass(frozen=True)
class Quantised:
    """A matrix [O, D] in few bits and scales; group: inputs that share a scale, 0 for the whole channel."""

    values: Tensor  # int8 or float8_e4m3fn [O, D], or uint8 [O, D / 2]: two int4 in a byte
    scale: Tensor  # float32 [O], or bfloat16 [O, D / group]
    group: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1] * (2 if self.group else 1)

    @property
    def precision(self) -> str:
        if self.group:
            return "int4"
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    def to(self, device: torch.device | str) -> Quantised:
        """The same matrix on a device."""
        return Quantised(self.values.to(device), self.scale.to(device), self.group)

    def dequantised(self) -> Tensor:
        """float32 [O, D]."""
        if self.group:
            return dequantise_int4(self.values, self.scale)
        return dequantise_int8(self.values, self.scale)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, D], any float -> q int8 [O, D], scale float32 [O]; a channel of zeros has scale 0."""
    wide = weight.float()
    scale = wide.abs().amax(1) / 127
    q = (wide / scale.clamp(min=1e-30)[:, None]).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [O, D], any float -> float8_e4m3fn [O, D], scale float32 [O]; a channel of zeros has scale 0."""
    wide = weight.float()
    scale = wide.abs().amax(1) / FP8_MOST
    values = (wide / scale.clamp(min=1e-30)[:, None]).clamp(-FP8_MOST, FP8_MOST)
    return values.to(torch.float8_e4m3fn), scale


def dequantise_int8(q: Tensor, scale: Tensor) -> Tensor:
    """The weights that (q, scale) stand for, q int8 or float8_e4m3fn, float32 [O, D]."""
    return q.float() * scale[:, None]


def quantise_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """weight [O, D], D a multiple of `group` -> packed uint8 [O, D / 2], scale bfloat16 [O, D / group].

    Input 2 i is the low nibble of byte i, input 2 i + 1 the high one, each q + 8. Of the scales tried for a
    group the one of least squared error is taken; the extreme of a group becomes -8.
    """
    outputs, inputs = weight.shape
    if group not in GROUPS or inputs % group:
        raise ValueError(
            f"quantise_int4: {inputs} inputs in groups of {group}; choose one of {GROUPS} that divides them"
        )
    parts = weight.float().view(outputs, inputs // group, group)
    extreme = parts.gather(2, parts.abs().argmax(2, keepdim=True))
    best_q, best_scale = torch.empty_like(parts), torch.empty_like(extreme)
    least = torch.full_like(extreme, float("inf"))
    for factor in SEARCHED.tolist():
        scale = (extreme / -8 * factor).bfloat16().float()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        q = (parts / safe).round().clamp(-8, 7)
        error = (q * scale - parts).square().sum(2, keepdim=True)
        better = error < least
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    nibbles = (best_q + 8).to(torch.uint8).view(outputs, inputs)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), best_scale[..., 0].bfloat16()


def dequantise_int4(packed: Tensor, scale: Tensor) -> Tensor:
    """The weights that (packed, scale) stand for, float32 [O, D]."""
    outputs, groups = scale.shape
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).view(outputs, groups, -1)
    return ((nibbles.float() - 8) * scale.float()[..., None]).view(outputs, -1)


def _in_pieces(quantise: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Some channels at a time, each for itself: a vocabulary's head in float32, times a few, is gigabytes."""
    outputs, step = len(weight), max(1, PIECE_VALUES // weight.shape[1])
    values, scale = quantise(weight[:step])
    if outputs <= step:
        return values, scale
    wholes = [part.new_empty(outputs, *part.shape[1:]) for part in (values, scale)]
    for first in range(0, outputs, step):
        for whole, part in zip(wholes, quantise(weight[first : first + step]), strict=True):
            whole[first : first + step] = part
    return wholes[0], wholes[1]


def _int8(weight: Tensor, group: int = GROUPS[0]) -> Quantised:
    return Quantised(*_in_pieces(quantise_int8, weight))


def _fp8(weight: Tensor, group: int = GROUPS[0]) -> Quantised:
    return Quantised(*_in_pieces(quantise_fp8, weight))


def _int4(weight: Tensor, group: int = GROUPS[0]) -> Quantised:
    return Quantised(*_in_pieces(lambda piece: quantise_int4(piece, group), weight), group)


QUANTISERS: dict[str, Callable[..., Quantised]] = {
    "int8": _int8,
    "int4": _int4,
    "fp8": _fp8,
}  # (weight, group)
