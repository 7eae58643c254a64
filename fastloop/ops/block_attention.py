"""block_attention: full (not causal) attention inside each block, and nothing outside it.

A listening chunk is one block of 20 positions; offline mode uses blocks of 100.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .contract import check_dims, check_floats
from .dispatch import define
from .native import FLOAT32, address, check_native, register_native, require_native, team


def _check(qkv: Tensor, heads: int) -> None:
    """Check the contract."""
    check_dims("block_attention", qkv=(qkv, "B T W"))
    check_floats("block_attention", qkv=qkv)
    if heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"block_attention: dimension W of qkv is {qkv.shape[-1]}, not 3 x heads ({heads}) x head width"
        )


def block_attention_ref(qkv: Tensor, heads: int) -> Tensor:
    """qkv [B, T, 3E] as [q | k | v] -> [B, T, E]; scale 1/sqrt(E / heads)."""
    _check(qkv, heads)
    q, k, v = rearrange(qkv, "b t (three h k) -> three b h t k", three=3, h=heads)
    if qkv.is_cuda and qkv.dtype == torch.float32:  # torch's kernel makes float32 products of TF32 ones
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return rearrange(mixed, "b h t k -> b t (h k)")


def _fake(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


block_attention = define(block_attention_ref, _fake)


def block_attention_cpu(qkv: Tensor, heads: int, isa: str | None = None) -> Tensor:
    """`block_attention_ref` in C++ (csrc/cpu/block_attention.cpp), float32, on up to torch's threads."""
    _check(qkv, heads)
    check_native("block_attention", qkv=qkv)
    qkv = qkv.contiguous()
    blocks, positions, triple = qkv.shape
    out = qkv.new_empty(blocks, positions, triple // 3)
    require_native().block_attention(
        team=team(),
        blocks=blocks,
        positions=positions,
        heads=heads,
        head_width=triple // 3 // heads,
        qkv=address(qkv),
        out=address(out),
        isa=isa,
    )
    return out


register_native(block_attention, block_attention_cpu, takes={"qkv": FLOAT32})


def block_attention_bytes(blocks: int, positions: int, width: int, itemsize: int = 4) -> int:
    """Bytes moved: q, k, v in, the result out."""
    return 4 * blocks * positions * width * itemsize
