"""How KV pages lie in memory: as rows, which every backend reads, or as the tiles of the native decoder.

    rows    [L, P, Q, G, K]            slot after slot, float of any dtype; float8 with a scale
    tiles   [L, P, G, Q / 64, bytes]   64 slots of one KV head as attention multiplies them (csrc/cpu/tiles.h)

Tiles hold float32, bfloat16 or int8. An int8 key is q x scale x range: one scale for each slot and head, a
power of two for each channel. Qwen2.5's K bias is huge in a few channels, which would leave the others a
few steps of one scale; the ranges are the sizes that weights and bias make the channels expect. Scales have
the 8 significant bits of bfloat16, so what is read is exact, and stored again it is the same bytes.
Source of the ranges: SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), applied to cached keys.

Rows of float8_e4m3fn, for GPUs, leave the K bias out (fastloop.ops.rope_append) and have one scale for each
layer and KV head, known before the first key is: E4M3 spans 15 powers of two in full precision, so a scale
that nothing overflows leaves keys 400 times smaller than usual their 3 bits of mantissa. A scale for each
page would be known only when the page is full: its earlier rows would be stored again in a captured step.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import DecoderConfig
from ..ops.rope_append import to_float8
from ..quantise import FP8_MOST, Quantised

TILE = 64  # slots
PANEL = 32  # slots of keys, channels of values, that are multiplied at once
LARGE = 4 << 20  # bytes of a pool from which on huge pages are worth it
DEVIATIONS = 3.0  # a channel's size: its bias, and so many standard deviations of the rest


def fits_tiles(config: DecoderConfig, page_tokens: int) -> bool:
    """Whether pages of these dims can be tiles."""
    return page_tokens % TILE == 0 and config.head_width % PANEL == 0


def in_huge_pages(pool: Tensor) -> Tensor:
    """Asks for pages of 2 MB under a large pool on Linux, before it is written to: tiles are read faster, as
    prefetches do not stop at the end of every 4 KB. A hint: where it is not taken, nothing happens.
    """
    if sys.platform.startswith("linux") and pool.device.type == "cpu" and pool.nbytes >= LARGE:
        first = -(-pool.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (pool.data_ptr() + pool.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return pool


def slot_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of the key or the value of one slot in one layer; int8 has a float32 scale beside it."""
    scale = 4 if dtype == torch.int8 else 0
    return config.kv_heads * (config.head_width * dtype.itemsize + scale)


@dataclass(frozen=True)
class RowLayout:
    """Pages of rows; kv_scale float32 [L, 2, G], of keys and values, where they are float8_e4m3fn. Such keys
    are bare: without their bias.
    """

    dtype: torch.dtype
    kv_scale: Tensor | None = None
    tiled = False
    key_range: Tensor | None = None

    def pool(self, config: DecoderConfig, pages: int, page_tokens: int, device: torch.device | str) -> Tensor:
        shape = (config.layers, pages, page_tokens, config.kv_heads, config.head_width)
        return torch.zeros(shape, dtype=self.dtype, device=device)

    @property
    def bare_keys(self) -> bool:
        return self.kv_scale is not None

    def keys(self, pages: Tensor) -> Tensor:
        """Some pages of a pool, [L, n, ...] -> rows [L, n, Q, G, K]; float32 where they are scaled."""
        return self._rows(pages, 0)

    def values(self, pages: Tensor) -> Tensor:
        return self._rows(pages, 1)

    def of_keys(self, rows: Tensor) -> Tensor:
        """The way back."""
        return self._pages(rows, 0)

    def of_values(self, rows: Tensor) -> Tensor:
        return self._pages(rows, 1)

    def _rows(self, pages: Tensor, part: int) -> Tensor:
        if self.kv_scale is None:
            return pages
        return pages.float() * self.kv_scale[:, part, None, None, :, None]

    def _pages(self, rows: Tensor, part: int) -> Tensor:
        if self.kv_scale is None:
            return rows.to(self.dtype)
        return to_float8(rows, self.kv_scale[:, part, None, None])


@dataclass(frozen=True)
class TileLayout:
    """Pages of tiles; key_range float32 [L, G, K] where they are int8."""

    dtype: torch.dtype
    head_width: int
    key_range: Tensor | None = None
    tiled = True
    bare_keys = False
    kv_scale: ClassVar[None] = None

    def pool(self, config: DecoderConfig, pages: int, page_tokens: int, device: torch.device | str) -> Tensor:
        tile = TILE * slot_bytes(config, self.dtype) // config.kv_heads // self.dtype.itemsize
        shape = (config.layers, pages, config.kv_heads, page_tokens // TILE, tile)
        return in_huge_pages(torch.zeros(shape, dtype=self.dtype, device=device))

    def keys(self, pages: Tensor) -> Tensor:
        """Some pages of a pool, [L, n, G, T, .] -> rows [L, n, Q, G, K]; float32 where they are bytes."""
        return self._ranged(self._rows(pages, self._key_parts), 1)

    def values(self, pages: Tensor) -> Tensor:
        return self._rows(pages, self._value_parts)

    def of_keys(self, rows: Tensor) -> Tensor:
        """Rows [L, n, Q, G, K] -> pages; the rows of a page together."""
        return self._tiles(self._ranged(rows, -1), self._key_parts)

    def of_values(self, rows: Tensor) -> Tensor:
        return self._tiles(rows, self._value_parts)

    def _ranged(self, rows: Tensor, power: int) -> Tensor:
        if self.key_range is None:
            return rows
        return rows * self.key_range[:, None, None] ** power

    @property
    def _unit(self) -> int:
        return 1 if self.dtype == torch.float32 else 2

    @property
    def _key_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(how [64, K] is split, the order of the parts in a tile)."""
        split = (TILE // PANEL, PANEL, self.head_width // self._unit, self._unit)
        return split, (0, 2, 3, 1) if self.dtype == torch.int8 else (0, 2, 1, 3)

    @property
    def _value_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        split = (TILE // self._unit, self._unit, self.head_width // PANEL, PANEL)
        return split, (2, 0, 1, 3) if self.dtype == torch.int8 else (2, 0, 3, 1)

    def _rows(self, pages: Tensor, parts: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        split, order = parts
        size = TILE * self.head_width
        whole = pages[..., :size].unflatten(-1, [split[i] for i in order])
        back = [order.index(i) - 4 for i in range(4)]
        rows = whole.permute(*range(4), *(i + 8 for i in back)).flatten(4, 5).flatten(5, 6)  # [.., 64, K]
        if self.dtype == torch.int8:
            rows = rows.float() * pages[..., size:].contiguous().view(torch.float32)[..., None]
        return rows.permute(0, 1, 3, 4, 2, 5).flatten(2, 3).contiguous()

    def _tiles(self, rows: Tensor, parts: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        split, order = parts
        tiles = rows.unflatten(2, (-1, TILE)).permute(0, 1, 4, 2, 3, 5)  # [L, n, G, T, 64, K]
        scale = None
        if self.dtype == torch.int8:
            tiles, scale = quantise_rows(tiles)
        tiles = tiles.to(self.dtype).unflatten(-1, split[2:]).unflatten(-3, split[:2])
        whole = tiles.permute(*range(4), *(4 + i for i in order)).flatten(4)
        return whole if scale is None else torch.cat((whole, scale.contiguous().view(torch.int8)), dim=-1)


KVLayout = RowLayout | TileLayout


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [..., K] -> whole numbers of -127..127 in float32, scale float32 [...]: NaN of one not finite."""
    rows = rows.float()
    scale = (rows.abs().amax(-1) * (1 / 127)).bfloat16().float()
    none = ~(scale >= 1e-30) | ~scale.isfinite()
    whole = (rows / scale.masked_fill(none, 1.0)[..., None]).round().masked_fill(none[..., None], 0.0)
    return whole, torch.where(rows.isfinite().all(-1), scale.masked_fill(none, 0.0), torch.nan)


def key_range(config: DecoderConfig, weights: Mapping[str, Any]) -> Tensor:
    """The range of every key channel, float32 [L, G, K], powers of two up to 1.

    Rotation mixes channel i with i + K/2, so both have one range. weights: tensors or Quantised by name.
    """
    ranges = []
    first, count = config.heads * config.head_width, config.kv_heads * config.head_width
    own = slice(first, first + count)
    for i in range(config.layers):
        name = f"decoder.layers.{i}."
        size = weights[name + "qkv.bias"][own].float().abs() + DEVIATIONS * _deviations(name, own, weights)
        pairs = size.view(config.kv_heads, 2, config.head_width // 2).norm(dim=1)
        top = pairs.amax(1, keepdim=True).clamp(min=1e-30)
        range_ = 2.0 ** (pairs / top).clamp(min=2.0**-20).log2().round()
        ranges.append(range_.repeat(1, 2))
    return torch.stack(ranges)


def _deviations(name: str, rows: slice, weights: Mapping[str, Any]) -> Tensor:
    """What some rows of a layer's qkv make, without bias, of numbers of size 1: its size, float32 [rows]."""
    weight = weights[name + "qkv.weight"]
    if isinstance(weight, Quantised):
        weight = Quantised(weight.values[rows], weight.scale[rows], weight.group).dequantised()
    else:
        weight = weight[rows].float()
    return (weight * weights[name + "norm1.weight"].float()).norm(dim=1)


def kv_scale(config: DecoderConfig, weights: Mapping[str, Any]) -> Tensor:
    """The scales of float8 pages, float32 [L, 2, G], powers of two: no bare key and no value is too large.

    The norm's output has the length sqrt(D), so a row of qkv makes at most that times its own norm (Cauchy
    and Schwarz); rotation makes at most the length of a pair of it. weights: tensors or Quantised by name.
    """
    scales = []
    first, count = config.heads * config.head_width, config.kv_heads * config.head_width
    for i in range(config.layers):
        name = f"decoder.layers.{i}."
        most = _deviations(name, slice(first, first + 2 * count), weights) * config.width**0.5
        most[count:] += weights[name + "qkv.bias"][first + count :].float().abs()
        keys = most[:count].view(config.kv_heads, 2, config.head_width // 2).norm(dim=1).amax(1)
        values = most[count:].view(config.kv_heads, config.head_width).amax(1)
        largest = torch.stack((keys, values)).clamp(min=1e-30)
        scales.append(2.0 ** (largest / FP8_MOST).log2().ceil())
    return torch.stack(scales)
