"""paged_attention: softmax(q k^T / sqrt(K)) v of ragged new rows over paged keys, causal, grouped queries.

    _paged_attention   one tile of rows x one KV head x one range of slots -> its part of the result
    _combine           the parts of a row, where there is more than one

Who owns what: the R = H / G query heads of a KV head are packed into the rows of one product, so 13 rows x 8
heads are one tile of 104 (of BLOCK_ROWS = 128) and every key is read once for all of them. A program owns
such a tile and one of up to SPLITS ranges of its slots; a tile of one or two rows (text) runs with 16 rows.
Bytes moved: every key and value once per tile, q in, the result out; where a context is split, each range
adds 4 bytes of scratch out and in per row, head and K, through L2.
Why this version: the host knows only how many rows and sequences there are. Which sequence a tile belongs to,
how many ranges its context is worth, and where they lie is computed on the device from row_starts and
kv_lens, so one captured launch serves every context length; what is not needed exits at once. The parts are
combined by a second kernel in a fixed order: no counter is shared between streams, repeats are equal to the
bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.paged_attention import _check as check_paged_attention
from .device import LOG2_E, begin, dot, narrow
from .launch import accept, launch, processors
from .tuning import choose


@triton.jit
def _tile_of(row_starts, tile, sequences, TILE: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr):
    """(sequence, first of its tiles) of a tile. Sequence b's tiles begin at row_starts[b] // TILE + b:
    that leaves it at least as many as its rows fill, and the numbers rise with b.
    """
    b = tl.arange(0, BLOCK_SEQUENCES)
    first = tl.load(row_starts + b, mask=b < sequences, other=0) // TILE + b
    before = (first <= tile) & (b < sequences)
    return tl.sum(before.to(tl.int32), 0) - 1, tl.max(tl.where(before, first, 0), 0)


@triton.jit
def _steps_of(end, rows, SPLITS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, SMALL: tl.constexpr):
    """How many steps of BLOCK_SLOTS slots each range takes of a tile that sees slots 0..end-1. A tile of 104
    rows writes 53 KB of scratch for a range and reads 16 KB for a step of 32 slots: at least four steps then.
    """
    steps = tl.cdiv(end, BLOCK_SLOTS)
    least = tl.where(rows <= SMALL, 1, 4)
    return tl.maximum(tl.cdiv(steps, SPLITS), least)


@triton.jit
def _attend(
    q, k_pages, v_pages, table, out, partial, lse, first_row, rows, group, groups, all_rows, own_slot, split,
    steps, end, gap_begin, gap_end, scale, R: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Rows first_row..first_row + rows - 1, whose first one sits in own_slot, over range `split`."""
    packed = tl.arange(0, BLOCK_ROWS)
    row, head = packed // R, group * R + packed % R
    index = tl.arange(0, BLOCK_HEAD)
    real = (row < rows)[:, None] & (index < HEAD)[None, :]
    base = first_row.to(tl.int64) * (groups * R * HEAD)
    at = (row * (groups * R) + head)[:, None] * HEAD + index[None, :]
    own = own_slot + row
    COMPUTE: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    queries = tl.load(q + base + at, mask=real, other=0.0).to(COMPUTE)

    most = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)  # of the scores so far, times log2 e
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_HEAD), tl.float32)
    last = tl.minimum(end, (split + 1) * steps * BLOCK_SLOTS)
    for start in range(split * steps * BLOCK_SLOTS, last, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        written = (slot < end) & ((slot < gap_begin) | (slot >= gap_end))
        page = tl.load(table + slot // PAGE, mask=written, other=0).to(tl.int64)
        place = ((page * PAGE + slot % PAGE) * groups + group)[:, None] * HEAD + index[None, :]
        there = written[:, None] & (index < HEAD)[None, :]
        k = tl.load(k_pages + place, mask=there, other=0.0).to(COMPUTE)
        scores = dot(queries, tl.trans(k), tl.zeros((BLOCK_ROWS, BLOCK_SLOTS), tl.float32))
        seen = written[None, :] & (slot[None, :] <= own[:, None])
        scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(most - finite)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_pages + place, mask=there, other=0.0).to(COMPUTE)
        acc = dot(narrow(weights, COMPUTE), v, acc * shrink[:, None])
        most = peak

    if SPLITS == 1 or steps * BLOCK_SLOTS >= end:  # the only range
        tl.store(out + base + at, narrow(acc / total[:, None], out.dtype.element_ty), mask=real)
    else:
        some = tl.where(total == 0.0, 1.0, total)  # a row may see nothing of this range
        share = acc / some[:, None]
        base += split.to(tl.int64) * all_rows * (groups * R * HEAD)
        tl.store(partial + base + at, share, mask=real)
        place = (split * all_rows + first_row + row).to(tl.int64) * (groups * R) + head
        tl.store(lse + place, most + tl.log2(some), mask=row < rows)


@triton.jit(do_not_specialize=["all_rows", "sequences", "table_stride"])
def _paged_attention(
    q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps, out, partial, lse, all_rows, sequences,
    groups, table_stride, scale, R: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """TILE: rows in a tile; SMALL: rows in a tile of 16; both times R heads."""
    begin(DEPENDENT)
    tile, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, first_tile = _tile_of(row_starts, tile, sequences, TILE, BLOCK_SEQUENCES)
    start, stop = tl.load(row_starts + b), tl.load(row_starts + b + 1)
    before = (tile - first_tile) * TILE  # rows of the sequence in its earlier tiles
    rows = tl.minimum(stop - start - before, TILE)
    if rows > 0:
        own_slot = tl.load(kv_lens + b) - (stop - start) + before
        end = own_slot + rows
        steps = _steps_of(end, rows, SPLITS, BLOCK_SLOTS, SMALL)
        if split * steps * BLOCK_SLOTS < end:
            gap_begin, gap_end = tl.load(gaps + 2 * b), tl.load(gaps + 2 * b + 1)
            table = block_table + b.to(tl.int64) * table_stride
            if rows <= SMALL:
                _attend(
                    q, k_pages, v_pages, table, out, partial, lse, start + before, rows, group, groups,
                    all_rows, own_slot, split, steps, end, gap_begin, gap_end, scale, R, HEAD, PAGE, WIDE,
                    SPLITS, BLOCK_HEAD, 16, BLOCK_SLOTS,
                )  # fmt: skip
            else:
                _attend(
                    q, k_pages, v_pages, table, out, partial, lse, start + before, rows, group, groups,
                    all_rows, own_slot, split, steps, end, gap_begin, gap_end, scale, R, HEAD, PAGE, WIDE,
                    SPLITS, BLOCK_HEAD, BLOCK_ROWS, BLOCK_SLOTS,
                )  # fmt: skip


@triton.jit(do_not_specialize=["all_rows", "sequences"])
def _combine(
    partial, lse, row_starts, kv_lens, out, all_rows, sequences, heads,
    HEAD: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row and head: the parts, weighted by their sums."""
    begin(DEPENDENT)
    row, head = tl.program_id(0), tl.program_id(1)
    b = tl.arange(0, BLOCK_SEQUENCES)
    begun = (tl.load(row_starts + b, mask=b < sequences, other=0) <= row) & (b < sequences)
    sequence = tl.sum(begun.to(tl.int32), 0) - 1
    start, stop = tl.load(row_starts + sequence), tl.load(row_starts + sequence + 1)
    before = (row - start) // TILE * TILE
    rows = tl.minimum(stop - start - before, TILE)
    end = tl.load(kv_lens + sequence) - (stop - start) + before + rows
    steps = _steps_of(end, rows, SPLITS, BLOCK_SLOTS, SMALL)
    if steps * BLOCK_SLOTS < end:
        split = tl.arange(0, BLOCK_SPLITS)
        index = tl.arange(0, BLOCK_HEAD)
        used = split * steps * BLOCK_SLOTS < end
        at = (split * all_rows + row).to(tl.int64) * heads + head
        logs = tl.load(lse + at, mask=used, other=float("-inf"))
        weights = tl.exp2(logs - tl.max(logs, 0))
        both = used[:, None] & (index < HEAD)[None, :]
        parts = tl.load(partial + at[:, None] * HEAD + index[None, :], mask=both, other=0.0)
        result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
        place = out + (row.to(tl.int64) * heads + head) * HEAD + index
        tl.store(place, narrow(result, out.dtype.element_ty), mask=index < HEAD)


@functools.lru_cache(maxsize=1024)
def slot_splits(tiles: int, groups: int, processors: int, most: int) -> int:
    """Into how many ranges a context may be split: two blocks for every processor. One stream of 13 rows is
    one tile of 2 KV heads: 132 processors allow 132 ranges, so `most` decides; 64 streams allow 1 or 2.
    """
    return max(1, min(2 * processors // (tiles * groups), most))


def paged_attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    row_starts: Tensor,
    kv_lens: Tensor,
    gaps: Tensor,
) -> Tensor:
    """`paged_attention_ref` on a GPU: q [N, H, K], pages [P, Q, G, K], block_table int32 [B, M], row_starts
    int32 [B + 1], kv_lens int32 [B], gaps int32 [B, 2] -> [N, H, K] in q's dtype.

    Pages may be float8_e4m3fn (sm_89 and newer); they are widened to q's dtype as they are read.
    """
    check_paged_attention(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    accept("paged_attention", q=q, block_table=block_table, row_starts=row_starts, kv_lens=kv_lens, gaps=gaps)
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(
            "paged_attention: k_pages and v_pages must be contiguous; a copy would be the whole pool"
        )
    q = q.contiguous()
    row_starts, kv_lens, gaps = row_starts.contiguous(), kv_lens.contiguous(), gaps.contiguous()
    rows, heads, head = q.shape
    groups, sequences = k_pages.shape[2], kv_lens.shape[0]
    out = torch.empty((rows, heads, head), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    config = dict(
        choose(
            "paged_attention",
            q.device,
            rows=rows,
            sequences=sequences,
            itemsize=q.element_size(),
            head=head,
            single_rows=rows == sequences,
        )
    )
    most, repeat = config.pop("max_splits"), heads // groups
    config["BLOCK_ROWS"] = max(config["BLOCK_ROWS"], triton.next_power_of_2(repeat))
    per_tile = config["BLOCK_ROWS"] // repeat
    tiles = rows // per_tile + sequences
    splits = slot_splits(tiles, groups, processors(q.device), most)
    shared = {
        "HEAD": head,
        "SPLITS": splits,
        "TILE": per_tile,
        "SMALL": 16 // repeat,
        "BLOCK_SEQUENCES": triton.next_power_of_2(sequences),
        "BLOCK_HEAD": max(16, triton.next_power_of_2(head)),
        "BLOCK_SLOTS": config.pop("BLOCK_SLOTS"),
    }
    partial = lse = None
    if splits > 1:
        partial = torch.empty((splits, rows, heads, head), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, rows, heads), dtype=torch.float32, device=q.device)
    pages_fit = k_pages.dtype == q.dtype or k_pages.dtype == torch.float8_e4m3fn
    launch(
        _paged_attention, (tiles, groups, splits), q, k_pages, v_pages, block_table, row_starts, kv_lens,
        gaps, out, partial, lse, rows, sequences, groups, block_table.stride(0), head**-0.5,
        R=repeat, PAGE=k_pages.shape[1], WIDE=not pages_fit, **shared, **config,
    )  # fmt: skip
    if partial is not None:
        launch(
            _combine, (rows, heads), partial, lse, row_starts, kv_lens, out, rows, sequences, heads,
            BLOCK_SPLITS=triton.next_power_of_2(splits), **shared,
        )  # fmt: skip
    return out
