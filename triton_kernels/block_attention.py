"""block_attention: softmax(q k^T / sqrt(K)) v inside each block of positions.

Who owns what: a program owns BLOCK_QUERIES positions of one head of one block and walks over the block's
keys, BLOCK_KEYS at a time, with a running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867).
Bytes moved: q once, k and v once per query tile, the result once.
Why this version: a chunk's 20 positions are one tile of 32, so the walk is one step and the kernel is the
latency of its loads; 100 positions are two tiles of 64 that read 200 keys. Any other size works.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.block_attention import _check as check_block_attention
from .device import LOG2_E, begin, dot, narrow
from .launch import accept, launch
from .tuning import choose


@triton.jit(do_not_specialize=["positions"])
def _block_attention(
    qkv, out, positions, width, heads, scale,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """width: E = heads x HEAD; scale: 1 / sqrt(K)."""
    begin(DEPENDENT)
    block, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    index = tl.arange(0, BLOCK_HEAD)
    rows = qkv + block * positions * (3 * width) + head * HEAD
    real = (query < positions)[:, None] & (index < HEAD)[None, :]
    q = tl.load(rows + query[:, None] * (3 * width) + index[None, :], mask=real, other=0.0)

    most = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)  # of the scores so far, times log2 e
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_HEAD), tl.float32)
    for start in range(0, positions, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        there = (key < positions)[:, None] & (index < HEAD)[None, :]
        place = rows + width + key[:, None] * (3 * width) + index[None, :]
        k = tl.load(place, mask=there, other=0.0)
        v = tl.load(place + width, mask=there, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)) * (scale * LOG2_E)
        scores = tl.where((key < positions)[None, :], scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        shrink = tl.exp2(most - peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = dot(narrow(weights, v.dtype), v, acc * shrink[:, None])
        most = peak
    place = out + (block * positions + query[:, None]) * width + head * HEAD + index[None, :]
    tl.store(place, narrow(acc / total[:, None], out.dtype.element_ty), mask=real)


def block_attention_triton(qkv: Tensor, heads: int) -> Tensor:
    """`block_attention_ref` on a GPU: qkv [B, T, 3E] as [q | k | v] -> [B, T, E]."""
    check_block_attention(qkv, heads)
    accept("block_attention", qkv=qkv)
    blocks, positions, triple = qkv.shape
    qkv, width = qkv.contiguous(), triple // 3
    head = width // heads
    out = torch.empty((blocks, positions, width), dtype=qkv.dtype, device=qkv.device)
    config = choose(
        "block_attention", qkv.device, positions=positions, itemsize=qkv.element_size(), blocks=blocks
    )
    grid = (blocks * heads, triton.cdiv(positions, config["BLOCK_QUERIES"]))
    launch(
        _block_attention, grid, qkv, out, positions, width, heads, head**-0.5,
        HEAD=head, BLOCK_HEAD=max(16, triton.next_power_of_2(head)), **config,
    )  # fmt: skip
    return out
