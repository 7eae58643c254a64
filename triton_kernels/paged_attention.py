"""paged_attention: softmax(q k^T / sqrt(K)) v of ragged new rows over paged keys, causal, grouped queries.

    _paged_attention   units: a tile of rows x one KV head x one range of slots -> a part of the result
    _combine           the parts of a row, where there is more than one

Who owns what: the R = H / G query heads of a KV head are packed into the rows of one product, so 13 rows x 8
heads are one tile of 104 (of BLOCK_ROWS = 128) and every key is read once for all of them; a tile of one or
two rows (text) runs with 16 rows. `programs` programs of each KV head take the units in turn. Bytes moved:
every key and value once per tile, q in, the result out; where a context is split, 4 bytes of scratch out and
in for each row, head, K and range, through L2.
Why this version: the host knows only how many rows and sequences there may be, and most of a captured step's
sequences are padding. How many units there are, how long, and whose, is computed on the device from
row_starts and kv_lens: the slots of all tiles, divided by the programs, are a unit's length. So one launch
serves every context, one stream is split over the whole device and a thousand are not, and padding takes no
program. The parts are combined by a second kernel in a fixed order: no counter is shared between streams.

Scaled pages (float8_e4m3fn, half the bytes) hold keys without their bias b, which is put back as a key is
widened: R(p) b for the positions p = p0 + j of a step's slots is cos(j f) A + sin(j f) B, with A = R(p0) b
and B a quarter turn of it. So a step takes 128 angles in float64, and the table of j f stays in
registers (3 multiply-adds a key element; its bytes take longer). Positions go on behind a gap, so no step
spans it: one ends where it begins, the next one begins where it ends. The products with the values of a step
are summed apart and then added in float32: tensor cores that keep few bits of a sum then keep them of 16
terms, whatever the context. Two sums of 128 x 128 and the table leave registers for steps of 16 slots only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.paged_attention import _check as check_paged_attention
from ..ops.paged_attention import scaled_of
from .device import LOG2_E, begin, dot, dot_once, narrow, widen
from .launch import accept, accept_float8, launch, processors, rows_apart
from .rope_append import cos_sin, cos_sin_near
from .tuning import choose


@triton.jit
def _ceil(a, b):
    return (a + b - 1) // b


@triton.jit
def _range(
    rows, length, quantum, SMALL: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """(steps of BLOCK_SLOTS slots in a range, ranges) of a sequence. A tile of 104 rows writes 53 KB of
    scratch for a range and reads 16 KB for a step of 32 slots: at least LEAST steps then. No rows: no range.
    """
    steps = tl.where(rows > 0, _ceil(length, BLOCK_SLOTS), 0)
    least = tl.where(rows <= SMALL, 1, LEAST)
    each = tl.maximum(tl.maximum(quantum, least), _ceil(steps, SPLITS))
    return each, _ceil(steps, each)


@triton.jit
def _plan(
    row_starts, kv_lens, sequences, programs, TILE: tl.constexpr, SMALL: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """The steps that a program's share has, and for every sequence its units, up to and with it: (quantum,
    all units, those of split sequences, which need scratch).
    """
    b = tl.arange(0, BLOCK_SEQUENCES)
    start = tl.load(row_starts + b, mask=b < sequences, other=0)
    rows = tl.load(row_starts + b + 1, mask=b < sequences, other=0) - start
    length = tl.load(kv_lens + b, mask=b < sequences, other=0)
    tiles = _ceil(rows, TILE)
    steps = tl.where(rows > 0, _ceil(length, BLOCK_SLOTS), 0)
    quantum = _ceil(tl.sum(tiles * steps, 0), programs)
    _, ranges = _range(rows, length, quantum, SMALL, SPLITS, LEAST, BLOCK_SLOTS)
    units = tiles * ranges
    return quantum, tl.cumsum(units, 0), tl.cumsum(tl.where(ranges > 1, units, 0), 0)


@triton.jit
def _before(ends, b, BLOCK_SEQUENCES: tl.constexpr):
    """How much the sequences before b have, of running sums `ends`."""
    return tl.max(tl.where(tl.arange(0, BLOCK_SEQUENCES) < b, ends, 0), 0)


@triton.jit
def _attend(
    q, k_pages, v_pages, kv_scale, bias, inv_freq, table, out, partial, lse, first_row, rows, group, groups,
    own_slot, begin_slot, end_slot, scratch, gap_begin, gap_end, zero, scale, R: tl.constexpr,
    HEAD: tl.constexpr, PAGE: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
    SCRATCH_ROWS: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Rows first_row..first_row + rows - 1, whose first one sits in own_slot, over slots begin..end - 1.
    scratch: where the part of this range goes; -1 where it is the whole. zero: the position of slot 0.
    """
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
    if SCALED:
        HALF: tl.constexpr = HEAD // 2
        k_scale, v_scale = tl.load(kv_scale + group), tl.load(kv_scale + groups + group)
        own_bias = bias + (groups * R + group) * HEAD
        inner = index < HEAD
        b = tl.load(own_bias + index, mask=inner, other=0.0).to(tl.float32)
        across = tl.where(index < HALF, index + HALF, index - HALF)
        turn = tl.load(own_bias + across, mask=inner, other=0.0).to(tl.float32)
        turn = tl.where(index < HALF, -turn, turn)  # a quarter turn of b
        frequency = tl.load(inv_freq + index % HALF, mask=inner, other=0.0).to(tl.float64)
        cos, sin = cos_sin_near(tl.arange(0, BLOCK_SLOTS)[:, None], frequency[None, :])
        before = tl.maximum(tl.minimum(gap_begin, end_slot) - begin_slot, 0)
        near_end = begin_slot + _ceil(before, BLOCK_SLOTS) * BLOCK_SLOTS
        skipped = tl.maximum(begin_slot, gap_end // BLOCK_SLOTS * BLOCK_SLOTS) - near_end
        last = tl.maximum(near_end, end_slot - skipped)
    else:
        last = end_slot
    for start in range(begin_slot, last, BLOCK_SLOTS):
        if SCALED:
            near = start < near_end  # of the gap
            first = start + tl.where(near, 0, skipped)
            slot = first + tl.arange(0, BLOCK_SLOTS)
            written = (slot < end_slot) & tl.where(near, slot < gap_begin, slot >= gap_end)
        else:
            slot = start + tl.arange(0, BLOCK_SLOTS)
            written = (slot < end_slot) & ((slot < gap_begin) | (slot >= gap_end))
        page = tl.load(table + slot // PAGE, mask=written, other=0).to(tl.int64)
        place = ((page * PAGE + slot % PAGE) * groups + group)[:, None] * HEAD + index[None, :]
        there = written[:, None] & (index < HEAD)[None, :]
        if SCALED:
            position = zero + first - tl.where(near, 0, gap_end - gap_begin)
            first_cos, first_sin = cos_sin(position.to(tl.float64) * frequency)
            low, high = first_cos * b + first_sin * turn, first_cos * turn - first_sin * b
            whole = cos * low[None, :] + sin * high[None, :]
            stored = widen(tl.load(k_pages + place, mask=there, other=0.0))
            k = narrow(stored * k_scale + whole, COMPUTE)
        else:
            k = tl.load(k_pages + place, mask=there, other=0.0).to(COMPUTE)
        scores = dot_once(queries, tl.trans(k))
        seen = written[None, :] & (slot[None, :] <= own[:, None])
        scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        peak = tl.maximum(most, tl.max(scores, 1))
        finite = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(most - finite)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_pages + place, mask=there, other=0.0)
        v = widen(v).to(COMPUTE) if SCALED else v.to(COMPUTE)
        if SCALED:
            own_sum = dot(narrow(weights, COMPUTE), v, tl.zeros((BLOCK_ROWS, BLOCK_HEAD), tl.float32))
            acc = acc * shrink[:, None] + own_sum
        else:
            acc = dot(narrow(weights, COMPUTE), v, acc * shrink[:, None])
        most = peak

    if SCALED:
        acc *= v_scale

    if scratch < 0:
        tl.store(out + base + at, narrow(acc / total[:, None], out.dtype.element_ty), mask=real)
    else:
        some = tl.where(total == 0.0, 1.0, total)  # a row may see nothing of this range
        place = (scratch * groups + group).to(tl.int64) * SCRATCH_ROWS + packed
        part = partial + place[:, None] * HEAD + index[None, :]
        tl.store(part, acc / some[:, None], mask=real)
        tl.store(lse + place, most + tl.log2(some), mask=row < rows)


@triton.jit(do_not_specialize=["sequences", "table_stride"])
def _paged_attention(
    q, k_pages, v_pages, kv_scale, bias, positions, inv_freq, block_table, row_starts, kv_lens, gaps, out,
    partial, lse, sequences, groups, table_stride, scale, programs, R: tl.constexpr, HEAD: tl.constexpr,
    PAGE: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, SMALL: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """TILE: rows in a tile; SMALL: rows in a tile of 16; both times R heads."""
    begin(DEPENDENT)
    group = tl.program_id(1)
    quantum, ends, scratch_ends = _plan(
        row_starts, kv_lens, sequences, programs, TILE, SMALL, SPLITS, LEAST, BLOCK_SLOTS, BLOCK_SEQUENCES
    )  # fmt: skip
    # Nothing is hoisted: what could be are pointers of a tile, and their registers cost a second block.
    for unit in tl.range(tl.program_id(0), tl.max(ends, 0), programs, num_stages=1, disable_licm=True):
        b = tl.sum((ends <= unit).to(tl.int32), 0)
        start = tl.load(row_starts + b)
        all_rows, length = tl.load(row_starts + b + 1) - start, tl.load(kv_lens + b)
        each, ranges = _range(all_rows, length, quantum, SMALL, SPLITS, LEAST, BLOCK_SLOTS)
        mine = unit - _before(ends, b, BLOCK_SEQUENCES)
        tile, split = mine // ranges, mine % ranges
        scratch = tl.where(ranges > 1, _before(scratch_ends, b, BLOCK_SEQUENCES) + mine, -1)
        rows = tl.minimum(all_rows - tile * TILE, TILE)
        own_slot = length - all_rows + tile * TILE
        begin_slot = split * each * BLOCK_SLOTS
        end_slot = tl.minimum(own_slot + rows, begin_slot + each * BLOCK_SLOTS)
        gap_begin, gap_end = tl.load(gaps + 2 * b), tl.load(gaps + 2 * b + 1)
        table = block_table + b.to(tl.int64) * table_stride
        zero = 0
        if SCALED:
            first = length - all_rows
            first = tl.where(first < gap_begin, first, tl.maximum(gap_begin, first - (gap_end - gap_begin)))
            zero = tl.load(positions + start) - first
        if rows <= SMALL:
            _attend(
                q, k_pages, v_pages, kv_scale, bias, inv_freq, table, out, partial, lse, start + tile * TILE,
                rows, group, groups, own_slot, begin_slot, end_slot, scratch, gap_begin, gap_end, zero, scale,
                R, HEAD, PAGE, WIDE, SCALED, BLOCK_ROWS, BLOCK_HEAD, 16, BLOCK_SLOTS,
            )  # fmt: skip
        else:
            _attend(
                q, k_pages, v_pages, kv_scale, bias, inv_freq, table, out, partial, lse, start + tile * TILE,
                rows, group, groups, own_slot, begin_slot, end_slot, scratch, gap_begin, gap_end, zero, scale,
                R, HEAD, PAGE, WIDE, SCALED, BLOCK_ROWS, BLOCK_HEAD, BLOCK_ROWS, BLOCK_SLOTS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["sequences"])
def _combine(
    partial, lse, row_starts, kv_lens, out, sequences, groups, programs, R: tl.constexpr, HEAD: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row and head: its parts, weighted by their sums."""
    begin(DEPENDENT)
    row, head = tl.program_id(0), tl.program_id(1)
    group = head // R
    quantum, _, scratch_ends = _plan(
        row_starts, kv_lens, sequences, programs, TILE, SMALL, SPLITS, LEAST, BLOCK_SLOTS, BLOCK_SEQUENCES
    )  # fmt: skip
    seen = tl.arange(0, BLOCK_SEQUENCES)
    begun = (tl.load(row_starts + seen, mask=seen < sequences, other=0) <= row) & (seen < sequences)
    b = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(row_starts + b)
    _, ranges = _range(
        tl.load(row_starts + b + 1) - start, tl.load(kv_lens + b), quantum, SMALL, SPLITS, LEAST, BLOCK_SLOTS
    )  # fmt: skip
    if ranges > 1:
        tile, within = (row - start) // TILE, (row - start) % TILE
        first = _before(scratch_ends, b, BLOCK_SEQUENCES) + tile * ranges
        split, index = tl.arange(0, SPLITS), tl.arange(0, BLOCK_HEAD)
        at = ((first + split) * groups + group).to(tl.int64) * BLOCK_ROWS + within * R + head % R
        logs = tl.load(lse + at, mask=split < ranges, other=float("-inf"))
        both = (split < ranges)[:, None] & (index < HEAD)[None, :]
        parts = tl.load(partial + at[:, None] * HEAD + index[None, :], mask=both, other=0.0)
        weights = tl.exp2(logs - tl.max(logs, 0))
        result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
        place = out + (row.to(tl.int64) * (groups * R) + head) * HEAD + index
        tl.store(place, narrow(result, out.dtype.element_ty), mask=index < HEAD)


def paged_attention_triton(
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
    """`paged_attention_ref` on a GPU: q [N, H, K], pages [P, Q, G, K], block_table int32 [B, M], row_starts
    int32 [B + 1], kv_lens int32 [B], gaps int32 [B, 2] -> [N, H, K] in q's dtype.

    Pages may be float8_e4m3fn (sm_89 and newer), scaled or not; they are widened to q's dtype as they are
    read.
    """
    check_paged_attention(q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps)
    scaled = scaled_of(q, k_pages, v_pages, kv_scale, bias, positions, inv_freq)
    accept("paged_attention", q=q, block_table=block_table, row_starts=row_starts, kv_lens=kv_lens, gaps=gaps)
    accept("paged_attention", q=q, kv_scale=kv_scale, bias=bias, positions=positions)
    for name, pool in (("k_pages", k_pages), ("v_pages", v_pages)):
        accept_float8("paged_attention", name, pool)
        if not pool.is_contiguous():
            raise ValueError(f"paged_attention: {name} must be contiguous; the pool is not copied")
    q, block_table = q.contiguous(), rows_apart(block_table)
    row_starts, kv_lens, gaps = row_starts.contiguous(), kv_lens.contiguous(), gaps.contiguous()
    rows, heads, head = q.shape
    groups, sequences = k_pages.shape[2], kv_lens.shape[0]
    out = torch.empty((rows, heads, head), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    sizes = {"itemsize": q.element_size(), "head": head, "rows": rows, "scaled": scaled is not None}
    config = dict(choose("paged_attention", q.device, **sizes))
    repeat = heads // groups
    block_rows = max(config.pop("BLOCK_ROWS"), triton.next_power_of_2(repeat))
    programs = max(1, config.pop("programs_per_processor") * processors(q.device) // groups)
    shared = {
        "R": repeat,
        "HEAD": head,
        "SPLITS": config.pop("max_splits"),
        "LEAST": config.pop("least_steps", 4),
        "TILE": block_rows // repeat,
        "SMALL": 16 // repeat,
        "BLOCK_SEQUENCES": triton.next_power_of_2(sequences),
        "BLOCK_HEAD": max(16, triton.next_power_of_2(head)),
        "BLOCK_ROWS": block_rows,
        "BLOCK_SLOTS": config.pop("BLOCK_SLOTS"),
    }
    # Split sequences have fewer than 2 x programs units: their ranges are at least a program's share long,
    # but for the last range of each tile, and each of those tiles has more than one share.
    partial = torch.empty((2 * programs, groups, block_rows, head), dtype=torch.float32, device=q.device)
    lse = torch.empty((2 * programs, groups, block_rows), dtype=torch.float32, device=q.device)
    pages_fit = k_pages.dtype == q.dtype or k_pages.dtype == torch.float8_e4m3fn
    kv_scale, bias, positions, inv_freq = (None,) * 4 if scaled is None else (t.contiguous() for t in scaled)
    launch(
        _paged_attention, (programs, groups), q, k_pages, v_pages, kv_scale, bias, positions, inv_freq,
        block_table, row_starts, kv_lens, gaps, out, partial, lse, sequences, groups, block_table.stride(0),
        head**-0.5, programs, PAGE=k_pages.shape[1], WIDE=not pages_fit, SCALED=scaled is not None, **shared,
        **config,
    )  # fmt: skip
    launch(
        _combine, (rows, heads), partial, lse, row_starts, kv_lens, out, sequences, groups, programs,
        warps=4, **shared,
    )  # fmt: skip
    return out
