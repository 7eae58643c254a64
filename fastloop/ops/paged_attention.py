"""paged_attention: causal grouped-query attention of the new rows of many sequences over paged keys.

A sequence is a row of the block table: its slots 0..kv_len-1 lie in its pages in order, and its new
rows are the last of them. One gap of slots per sequence is skipped: the unused end of the pinned
prefix's last page, and what the window has dropped of the first page behind it.

    prefix pages                stream pages
    [p p p p p p . .] [. . . s s s s s] [s s s s s . . .]
                 gap = [6, 11)                  kv_len = 21

Scaled pages (rope_append) hold keys without their bias. Its part of a score is q R(p) b / sqrt(K) with p the
slot's position: known here, as slots outside the gap have positions in a row. So the bias is put back exactly
whatever the pages round.

Source: PagedAttention (Kwon et al. 2023, arXiv 2309.06180), GQA (Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import check_dims, check_dtype, check_floats, check_range, readable
from .dispatch import define
from .native import (
    FLOAT32,
    PAGE_FORMATS,
    address,
    check_native,
    check_pages,
    register_native,
    require_native,
    team,
)
from .rope_append import check_scaled, rotate

Scaled = tuple[Tensor, Tensor, Tensor, Tensor]  # kv_scale, bias, positions, inv_freq


def _check(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, lens: Tensor, gaps: Tensor
) -> None:
    """Check the contract: shapes, dtypes, and the values that say where to read."""
    sizes = check_dims(
        "paged_attention",
        q=(q, "N H K"),
        k_pages=(k_pages, "P Q G K"),
        v_pages=(v_pages, "P Q G K"),
        block_table=(table, "B M"),
        row_starts=(starts, "B+1"),
        kv_lens=(lens, "B"),
        gaps=(gaps, "B 2"),
    )
    if sizes["B+1"] != sizes["B"] + 1:
        raise ValueError(
            f"paged_attention: dimension B+1 of row_starts is {sizes['B+1']}, B elsewhere {sizes['B']}"
        )
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"paged_attention: dimension H of q is {sizes['H']}, no multiple of G = {sizes['G']} of k_pages"
        )
    check_floats("paged_attention", q=q)
    check_floats("paged_attention", k_pages=k_pages, v_pages=v_pages)
    check_dtype("paged_attention", torch.int32, block_table=table, row_starts=starts, kv_lens=lens, gaps=gaps)
    if readable(starts):
        _check_sequences(starts.tolist(), lens.tolist(), gaps.tolist(), sizes)


def scaled_of(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_scale: Tensor | None,
    bias: Tensor | None,
    positions: Tensor | None,
    inv_freq: Tensor | None,
) -> Scaled | None:
    """What scaled pages need, checked; None for plain ones."""
    op = "paged_attention"
    given = {"kv_scale": kv_scale, "bias": bias, "positions": positions, "inv_freq": inv_freq}
    absent = [name for name, tensor in given.items() if tensor is None]
    if len(absent) == len(given):
        return None
    if kv_scale is None or bias is None or positions is None or inv_freq is None:
        raise ValueError(f"{op}: {', '.join(given)} go together; missing: {', '.join(absent)}")
    check_scaled(op, kv_scale, k_pages, v_pages)
    sizes = check_dims(
        op, q=(q, "N H K"), positions=(positions, "N"), inv_freq=(inv_freq, "K/2"), bias=(bias, "W")
    )
    check_floats(op, q=q, bias=bias)
    check_floats(op, inv_freq=inv_freq)
    check_dtype(op, torch.int64, positions=positions)
    wanted = (sizes["H"] + 2 * k_pages.shape[2]) * sizes["K"]
    if sizes["K"] != 2 * sizes["K/2"] or sizes["W"] != wanted:
        raise ValueError(
            f"{op}: bias is {list(bias.shape)}, inv_freq {list(inv_freq.shape)}; q and the pages need "
            f"[{wanted}] and [{sizes['K'] / 2:g}]"
        )
    return kv_scale, bias, positions, inv_freq


def _rank(slot: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """How many slots that hold something are in front of a slot."""
    return slot.where(slot < begin, (slot - (end - begin)).maximum(begin))


def _widened(
    k: Tensor, v: Tensor, scaled: Scaled | None, position: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What pages hold in slots of these positions, k and v [..., G, K], in a dtype; scales are undone."""
    k, v = k.to(dtype), v.to(dtype)
    if scaled is None:
        return k, v
    kv_scale, bias, _, inv_freq = scaled
    groups, width = k.shape[-2:]
    own = bias[-2 * groups * width : -groups * width].view(groups, width).to(dtype)
    flat = position.reshape(-1)
    turned = rotate(own.expand(len(flat), groups, width), flat, inv_freq).view(k.shape)
    scale = kv_scale.to(dtype)[..., None]
    return k * scale[0] + turned, v * scale[1]


def _check_sequences(
    starts: list[int], lens: list[int], gaps: list[list[int]], sizes: dict[str, int]
) -> None:
    """row_starts, kv_lens and gaps fit each other and the block table."""
    rows, most = sizes["N"], sizes["M"] * sizes["Q"]
    if starts[0] != 0 or starts[-1] != rows or sorted(starts) != starts:
        raise ValueError(
            f"paged_attention: row_starts must rise from 0 to the {rows} rows of q, got {starts}"
        )
    for b, (length, (begin, end)) in enumerate(zip(lens, gaps, strict=True)):
        count = starts[b + 1] - starts[b]
        if not count <= length <= most:
            raise ValueError(
                f"paged_attention: kv_lens[{b}] is {length}; it must hold its {count} rows and be at most "
                f"the {most} slots of a row of block_table"
            )
        if begin < 0 or end < begin or (begin < length and end > max(begin, length - count)):
            raise ValueError(
                f"paged_attention: gap [{begin}, {end}) of sequence {b} must be a range that leaves out "
                f"its new rows' slots [{length - count}, {length})"
            )


def _pages(table: Tensor, lens: Tensor, page: int, pages: int) -> Tensor:
    """block_table int32 [B, M] -> page numbers int64 [B, M]; 0 for entries behind a sequence's last page."""
    used = torch.arange(table.shape[1], device=table.device) < ((lens + page - 1) // page)[:, None]
    numbers = table.masked_fill(~used, 0).long()
    check_range("paged_attention", "block_table", numbers, 0, pages)
    return numbers


def paged_attention_ref(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
    kv_scale: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """q [N, H, K], pages [P, Q, G, K], block_table int32 [B, M], row_starts int32 [B + 1],
    kv_lens int32 [B], gaps int32 [B, 2] as [start, end) -> [N, H, K] in q's dtype.

    Rows row_starts[b]..row_starts[b+1] (none, for a padded sequence) belong to sequence b and sit in its last
    slots; row i sees slot s when s <= its own slot and s is not in the gap. Scale 1/sqrt(K).

    Slots that no row of a sequence sees, and entries of the block table behind its last page, may hold
    anything. What is not finite in a slot spoils rows of its own sequence only.

    Scaled pages float8_e4m3fn: kv_scale float32 [2, G], bias [(H + 2G) K] of qkv in q's dtype, positions
    int64 [N], which rise by one from row to row of a sequence, inv_freq [K/2], all four or none.
    """
    _check(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    scaled = scaled_of(q, k_pages, v_pages, kv_scale, bias, positions, inv_freq)
    out = q.new_empty(q.shape)
    page, repeat = k_pages.shape[1], q.shape[1] // k_pages.shape[2]
    table = _pages(block_table, kv_lens, page, k_pages.shape[0])
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    for b in range(block_table.shape[0]):
        first, last, length = int(row_starts[b]), int(row_starts[b + 1]), int(kv_lens[b])
        pages = table[b, : -(-length // page)]
        slot = torch.arange(length, device=q.device)
        rank = _rank(slot, *gaps[b])
        position = rank if scaled is None or last == first else rank + scaled[2][last - 1] - rank[-1]
        k, v = (pool[pages].flatten(0, 1)[:length] for pool in (k_pages, v_pages))
        k, v = (
            x.repeat_interleave(repeat, dim=1) for x in _widened(k, v, scaled, position, wide)
        )  # [., H, K]
        own = slot[length - (last - first) :, None]
        seen = (slot <= own) & ~((slot >= gaps[b, 0]) & (slot < gaps[b, 1]))  # [rows, length]
        scores = torch.einsum("nhk,shk->hns", q[first:last].to(wide), k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        v = v.masked_fill(~seen.any(0)[:, None, None], 0)  # what no row may see may hold anything
        out[first:last] = torch.einsum("hns,shk->nhk", weights, v).to(q.dtype)
    return out


def paged_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
    kv_scale: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """The same with one padded batch and one call of torch's scaled_dot_product_attention."""
    _check(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    scaled = scaled_of(q, k_pages, v_pages, kv_scale, bias, positions, inv_freq)
    if not q.shape[0]:
        return q.new_empty(q.shape)
    page = k_pages.shape[1]
    length = int(kv_lens.max())
    pages = _pages(block_table, kv_lens, page, k_pages.shape[0])[:, : -(-length // page)]
    slot = torch.arange(pages.shape[1] * page, device=q.device)
    written = (slot < kv_lens[:, None]) & ~((slot >= gaps[:, :1]) & (slot < gaps[:, 1:]))  # [B, slots]
    empty = ~written[:, :, None, None]
    counts = row_starts.diff()
    k, v = (pool[pages].flatten(1, 2) for pool in (k_pages, v_pages))  # [B, slots, G, K]
    if scaled is not None:
        begin, end = gaps[:, :1], gaps[:, 1:]
        first = scaled[2][row_starts[:-1].clamp(max=len(q) - 1)][:, None]
        position = first - _rank((kv_lens - counts)[:, None], begin, end) + _rank(slot, begin, end)
        k, v = _widened(k, v, scaled, position, torch.float32)
    k, v = k.masked_fill(empty, 0), v.masked_fill(empty, 0)
    most = int(counts.max())
    offset = torch.arange(most, device=q.device)
    row = row_starts[:-1, None] + offset
    real = offset < counts[:, None]  # [B, most]
    row = torch.where(real, row, 0).long()
    own = torch.where(real, (kv_lens - counts)[:, None] + offset, (kv_lens - counts)[:, None])
    mask = written[:, None] & (slot <= own[..., None])  # [B, most, slots]
    padded = F.scaled_dot_product_attention(
        q[row].transpose(1, 2),
        k.to(q.dtype).transpose(1, 2),
        v.to(q.dtype).transpose(1, 2),
        attn_mask=mask[:, None],
        enable_gqa=True,
    )
    return padded.transpose(1, 2)[real]


def paged_attention_graph(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
    kv_scale: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """The same without a shape that depends on lengths: each row reads all columns of the block table."""
    _check(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    scaled = scaled_of(q, k_pages, v_pages, kv_scale, bias, positions, inv_freq)
    rows, page = q.shape[0], k_pages.shape[1]
    if not rows:
        return q.new_empty(q.shape)
    row = torch.arange(rows, device=q.device, dtype=torch.int32)
    owner = torch.searchsorted(row_starts, row, right=True) - 1  # the sequence of each row
    own = kv_lens[owner] - row_starts[owner + 1] + row  # the last slot that each row sees
    begin, end = gaps[owner].unbind(1)
    pages = _pages(block_table, kv_lens, page, k_pages.shape[0])[owner]  # [N, M]
    slot = torch.arange(pages.shape[1] * page, device=q.device)
    seen = (slot <= own[:, None]) & ~((slot >= begin[:, None]) & (slot < end[:, None]))  # [N, slots]
    hidden = ~seen[:, :, None, None]
    # float64, for the products of one row are long sums that torch adds up in one chain.
    k, v = (pool[pages].flatten(1, 2).double() for pool in (k_pages, v_pages))
    if scaled is not None:
        ranks = _rank(slot, begin[:, None], end[:, None]) - _rank(own, begin, end)[:, None]
        k, v = _widened(k, v, scaled, scaled[2][:, None] + ranks, torch.float64)
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    grouped = q.unflatten(1, (k.shape[2], -1)).double()  # [N, G, H / G, K]
    scores = grouped @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5  # [N, G, H / G, slots]
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (weights @ v.transpose(1, 2)).flatten(1, 2).to(q.dtype)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


paged_attention = define(paged_attention_ref, _fake)
paged_attention.register("torch", paged_attention_torch)
paged_attention.register("graph", paged_attention_graph)
paged_attention.defaults |= {"cpu": ("torch",), "cuda": ("torch",)}


def paged_attention_cpu(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
    isa: str | None = None,
) -> Tensor:
    """`paged_attention_ref` in C++ (csrc/cpu/paged_attention.cpp): q float32, pages float32 or bfloat16,
    products in float32, on up to torch's threads.
    """
    _check(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    check_native("paged_attention", q=q, block_table=block_table, row_starts=row_starts)
    check_native("paged_attention", kv_lens=kv_lens, gaps=gaps)
    check_pages("paged_attention", k_pages, v_pages)
    q, k_pages, v_pages = q.contiguous(), k_pages.contiguous(), v_pages.contiguous()
    table, starts = block_table.contiguous(), row_starts.contiguous()
    lens, gaps = kv_lens.contiguous(), gaps.contiguous()
    rows, heads, width = q.shape
    pages, page, groups, _ = k_pages.shape
    out = q.new_empty(q.shape)
    require_native().paged_attention(
        team=team(),
        rows=rows,
        sequences=len(lens),
        heads=heads,
        q=address(q),
        page_format=PAGE_FORMATS[k_pages.dtype],
        k_pages=address(k_pages),
        v_pages=address(v_pages),
        pages=pages,
        page_tokens=page,
        kv_heads=groups,
        head_width=width,
        row_starts=address(starts),
        block_table=address(table),
        table_width=table.shape[1],
        kv_lens=address(lens),
        gaps=address(gaps),
        out=address(out),
        isa=isa,
    )
    return out


register_native(paged_attention, paged_attention_cpu, takes={"q": FLOAT32, "k_pages": tuple(PAGE_FORMATS)})


def paged_attention_bytes(
    rows: int,
    kv_slots: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    itemsize: int = 4,
    page_itemsize: int | None = None,
) -> int:
    """Bytes moved: every key and value once, q in, the result out. page_itemsize: None is q's."""
    pages = kv_slots * kv_heads * (itemsize if page_itemsize is None else page_itemsize)
    return 2 * (pages + rows * heads * itemsize) * head_width
