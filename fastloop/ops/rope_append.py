"""rope_append: qkv bias, rotary embedding of q and k, and the write of k and v into the KV pages.

Source: RoFormer (Su et al. 2021, arXiv 2104.09864), rotate-half form as in Qwen2.5, plain 1-D positions.
Angles are formed in float64: positions of an hour-long stream times a frequency of 1 lose 0.01 rad in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_dims, define


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate x [N, heads, K] by positions [N] x inv_freq [K/2]. Rotations compose: R(a) R(b) = R(a + b)."""
    angle = positions.double()[:, None] * inv_freq.double()
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    cos, sin = angle.cos().to(wide)[:, None], angle.sin().to(wide)[:, None]
    low, high = x.to(wide).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def rope_append_ref(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """qkv [N, (H + 2G) K], bias [(H + 2G) K], positions int64 [N], slots int64 [N], inv_freq [K/2],
    pages [P, Q, G, K] (changed in place) -> q [N, H, K], rotated.

    Slot s is token s % Q of page s // Q. Slot -1 stores nothing (a padded row).
    """
    sizes = check_dims(
        "rope_append",
        qkv=(qkv, "N W"),
        positions=(positions, "N"),
        slots=(slots, "N"),
        k_pages=(k_pages, "P Q G K"),
        v_pages=(v_pages, "P Q G K"),
    )
    groups, width = sizes["G"], sizes["K"]
    if bias is not None:
        qkv = qkv + bias
    x = qkv.view(qkv.shape[0], -1, width)
    heads = x.shape[1] - 2 * groups
    kept = slots >= 0
    k = rotate(x[:, heads : heads + groups], positions, inv_freq)
    k_pages.view(-1, groups, width)[slots[kept]] = k[kept].to(k_pages.dtype)
    v_pages.view(-1, groups, width)[slots[kept]] = x[kept, heads + groups :].to(v_pages.dtype)
    return rotate(x[:, :heads], positions, inv_freq)


def _fake(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    groups, width = k_pages.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // width - 2 * groups, width)


rope_append = define(rope_append_ref, _fake, mutates=("k_pages", "v_pages"))


def rope_append_bytes(rows: int, heads: int, kv_heads: int, head_width: int, itemsize: int = 4) -> int:
    """Bytes moved: qkv in, q out, k and v into their pages."""
    return 2 * rows * (heads + 2 * kv_heads) * head_width * itemsize
