"""rope_append: qkv bias, rotary embedding of q and k, and the write of k and v into the KV pages.

Source: RoFormer (Su et al. 2021, arXiv 2104.09864), rotate-half form as in Qwen2.5, plain 1-D positions.
Angles are formed in float64: positions of an hour-long stream times a frequency of 1 lose 0.01 rad in
float32.

Scaled pages are float8_e4m3fn times a scale for each KV head, and lack the K bias, which paged_attention puts
back: a bias of 300 in a channel, as Qwen2.5 has, would leave that channel's key an error of 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantise import FP8_MOST
from .contract import check_dims, check_dtype, check_floats, check_range
from .dispatch import define
from .native import (
    FLOAT32,
    PAGE_FORMATS,
    address,
    check_native,
    check_pages,
    register_native,
    require_native,
    rows_of,
)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate x [N, heads, K] by positions [N] x inv_freq [K/2]. Rotations compose: R(a) R(b) = R(a + b)."""
    angle = positions.double()[:, None] * inv_freq.double()
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    cos, sin = angle.cos().to(wide)[:, None], angle.sin().to(wide)[:, None]
    low, high = x.to(wide).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., G, K] over scale [..., G] in float8_e4m3fn. What is too large becomes the largest, what is not
    finite NaN.
    """
    wide = x.float() / scale.float()[..., None]
    return wide.clamp(-FP8_MOST, FP8_MOST).masked_fill(~wide.isfinite(), torch.nan).to(torch.float8_e4m3fn)


def check_scaled(op: str, kv_scale: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Scaled pages: float8_e4m3fn (float64 as the truth about them), with kv_scale float32 [2, G]."""
    check_dims(op, k_pages=(k_pages, "P Q G K"), kv_scale=(kv_scale, "2 G"))
    exact = k_pages.dtype == v_pages.dtype == torch.float64
    check_dtype(op, torch.float64 if exact else torch.float32, kv_scale=kv_scale)
    if not exact:
        check_dtype(op, torch.float8_e4m3fn, k_pages=k_pages, v_pages=v_pages)


def _check(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
) -> dict[str, int]:
    """Check the contract; returns the sizes of its dimensions."""
    sizes = check_dims(
        "rope_append",
        qkv=(qkv, "N W"),
        positions=(positions, "N"),
        slots=(slots, "N"),
        inv_freq=(inv_freq, "K/2"),
        k_pages=(k_pages, "P Q G K"),
        v_pages=(v_pages, "P Q G K"),
    )
    if bias is not None:
        check_dims("rope_append", qkv=(qkv, "N W"), bias=(bias, "W"))
    check_floats("rope_append", qkv=qkv, bias=bias)
    check_floats("rope_append", inv_freq=inv_freq)
    check_floats("rope_append", k_pages=k_pages, v_pages=v_pages)
    check_dtype("rope_append", torch.int64, positions=positions, slots=slots)
    groups, width = sizes["G"], sizes["K"]
    if width != 2 * sizes["K/2"]:
        raise ValueError(
            f"rope_append: dimension K of k_pages is {width}, not twice the {sizes['K/2']} of inv_freq"
        )
    if sizes["W"] % width or sizes["W"] // width <= 2 * groups:
        raise ValueError(
            f"rope_append: dimension W of qkv is {sizes['W']}, not (H + 2 G) K for G = {groups}, K = {width} "
            "of k_pages"
        )
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if not pages.is_contiguous():
            raise ValueError(
                f"rope_append: {name} is changed in place and must be contiguous, "
                f"its strides are {pages.stride()}"
            )
    if kv_scale is not None:
        check_scaled("rope_append", kv_scale, k_pages, v_pages)
    check_range("rope_append", "slots", slots, -1, sizes["P"] * sizes["Q"])
    return sizes


def rope_append_ref(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """qkv [N, (H + 2G) K], bias [(H + 2G) K], positions int64 [N], slots int64 [N], inv_freq [K/2],
    pages [P, Q, G, K] (changed in place, of any floating dtype) -> q [N, H, K], rotated, in qkv's dtype.

    Slot s is token s % Q of page s // Q; slots are distinct. Slot -1 stores nothing (a padded row).

    kv_scale float32 [2, G], of keys and of values: the pages are float8_e4m3fn then, and hold R(position) k
    without its bias, and v with it, over these (`to_float8`).
    """
    sizes = _check(qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale)
    q, k, v = _parts(qkv, bias, positions, inv_freq, sizes, kv_scale)
    kept = slots >= 0
    for pool, new in _stored(k, v, k_pages, v_pages, kv_scale):
        pool[slots[kept]] = new[kept]
    return q


def _parts(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    inv_freq: Tensor,
    sizes: dict[str, int],
    kv_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, K] and k [N, G, K], rotated, and v [N, G, K]; k without its bias for scaled pages."""
    groups, width = sizes["G"], sizes["K"]
    x = (qkv if bias is None else qkv + bias).reshape(qkv.shape[0], sizes["W"] // width, width)
    heads = x.shape[1] - 2 * groups
    own = slice(heads, heads + groups)
    keys = x[:, own] if kv_scale is None else qkv.reshape(x.shape)[:, own]
    return (
        rotate(x[:, :heads], positions, inv_freq),
        rotate(keys, positions, inv_freq),
        x[:, heads + groups :],
    )


def _stored(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_scale: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(slots of a pool [P Q, G, K], what new rows [N, G, K] are there), of keys and of values."""
    found = []
    for number, (pool, new) in enumerate(((k_pages, k), (v_pages, v))):
        flat = pool.view(-1, *pool.shape[2:])
        if kv_scale is not None and pool.dtype == torch.float64:
            new = new / kv_scale[number][:, None]
        elif kv_scale is not None:  # as bytes: torch writes to places of few dtypes
            flat, new = flat.view(torch.uint8), to_float8(new, kv_scale[number]).view(torch.uint8)
        found.append((flat, new.to(flat.dtype)))
    return found


def rope_append_graph(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """The same without a shape that depends on slots: a padded row repeats what the first real one stores."""
    sizes = _check(qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale)
    rows = qkv.shape[0]
    if not rows:
        return qkv.new_empty(0, sizes["W"] // sizes["K"] - 2 * sizes["G"], sizes["K"])
    q, k, v = _parts(qkv, bias, positions, inv_freq, sizes, kv_scale)
    real = slots >= 0
    source = torch.where(
        real, torch.arange(rows, device=qkv.device), real.int().argmax()
    )  # the first real row
    target = slots[source].clamp(min=0)
    some = real.any()  # without one, slot 0 keeps what it holds
    for pool, new in _stored(k, v, k_pages, v_pages, kv_scale):
        pool[target] = torch.where(some, new[source], pool[target])
    return q


def _fake(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
) -> Tensor:
    groups, width = k_pages.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // width - 2 * groups, width)


rope_append = define(rope_append_ref, _fake, mutates=("k_pages", "v_pages"))
rope_append.register("graph", rope_append_graph)


def rope_append_cpu(
    qkv: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """`rope_append_ref` in C++ (csrc/cpu/rope_append.cpp): rows float32, pages float32 or bfloat16, which are
    not scaled.
    """
    sizes = _check(qkv, bias, positions, slots, inv_freq, k_pages, v_pages, kv_scale)
    check_native("rope_append", qkv=qkv, bias=bias, positions=positions, slots=slots)
    check_pages("rope_append", k_pages, v_pages)
    pages, page, groups, width = k_pages.shape
    heads = sizes["W"] // width - 2 * groups
    qkv, inv_freq = rows_of(qkv), inv_freq.double().contiguous()
    bias = None if bias is None else bias.contiguous()
    positions, slots = positions.contiguous(), slots.contiguous()
    q = qkv.new_empty(len(qkv), heads, width)
    require_native().rope_append(
        rows=len(qkv),
        heads=heads,
        kv_heads=groups,
        head_width=width,
        qkv=address(qkv),
        qkv_stride=qkv.stride(0),
        bias=address(bias),
        positions=address(positions),
        slots=address(slots),
        inv_freq=address(inv_freq),
        page_format=PAGE_FORMATS[k_pages.dtype],
        k_pages=address(k_pages),
        v_pages=address(v_pages),
        pages=pages,
        page_tokens=page,
        q=address(q),
        isa=isa,
    )
    return q


register_native(rope_append, rope_append_cpu, takes={"qkv": FLOAT32, "k_pages": tuple(PAGE_FORMATS)})


def rope_append_bytes(rows: int, heads: int, kv_heads: int, head_width: int, itemsize: int = 4) -> int:
    """Bytes moved: qkv in, q out, k and v into their pages."""
    return 2 * rows * (heads + 2 * kv_heads) * head_width * itemsize
