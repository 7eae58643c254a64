"""mel: samples -> log-mel frames of many streams, each stream's state in its slot.

    _mel_power    mel power of a tile of frames: window, DFT of 400, filterbank      -> scratch [J, B, F', C]
    _mel_frames   sum over J, log10, the loudest frame, the clamp                    -> frames, state

The DFT is a product with tables of cosines and sines. Frame and table are folded about both their symmetries,
n <-> 400 - n and n <-> 200 - n, so even and odd columns k each take a quarter of the table:

    Re X[k] = sum_n (e[n] +- e[200 - n]) cos(2 pi n k / 400),   e[n] = w[n] (x[n] + x[400 - n]),   n = 0..100
    Im X[k] = sum_n (o[n] -+ o[200 - n]) sin(2 pi n k / 400),   o[n] = w[n] (x[n] - x[400 - n])    upper: even

Who owns what: a program of _mel_power owns BLOCK_FRAMES frames of a stream and one of J = SPLITS parts of the
columns, whose powers it weighs with the filters at once; a program of _mel_frames owns a stream: its maximum
needs all frames. Bytes moved per stream: S + 2 x 360 samples, the scratch out and in through L2, the frames.
Why this version: float32 products, not tensor cores: the frames are compared with Whisper's to 1e-6, and sums
of 101 terms err like an FFT of 400. Folding costs two additions a sample and saves three quarters of the
products; a 16 x 25 transform would save half of what is left, but 25 fills no tile. Few streams cut the
spectrum into parts (one stream is 12 programs); many sum the same parts in the same order: equal bits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import FFT_SAMPLES, HOP_SAMPLES
from ..ops.mel import (
    COLUMNS,
    EDGES,
    LOOKAHEAD_SAMPLES,
    POWER_FLOOR,
    RANGE_LOG10,
    TAIL_SAMPLES,
    _check_slots,
    check_mel,
)
from .device import begin, dot
from .launch import accept, launch, processors
from .tuning import choose

HOP, TAIL, SPECTRUM = tl.constexpr(HOP_SAMPLES), tl.constexpr(TAIL_SAMPLES), tl.constexpr(COLUMNS)
FLOOR, RANGE = tl.constexpr(POWER_FLOOR), tl.constexpr(RANGE_LOG10)
LEAD = tl.constexpr(TAIL_SAMPLES - HOP_SAMPLES + LOOKAHEAD_SAMPLES)  # edge="wait": the first frame's reach
FOLDED = tl.constexpr(101)  # n = 0..100, and the even columns; the odd ones are 100
PADDED = tl.constexpr(128)
LOG10_2 = tl.constexpr(math.log10(2))
COLUMN_BLOCK = 32


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(tables float32 [4, 128, 128], windows float32 [2, 128]), zero where there is no n or column.

    tables: cos of even k = 2 j, sin of even k, cos of odd k = 2 j + 1, sin of odd k, each [n, j].
    windows: Hann w[n] and w[200 - n]; zero where the fold would count a sample twice.
    """
    with torch.inference_mode(False):
        n = torch.arange(101, dtype=torch.int64)[:, None]
        tables, windows = torch.zeros(4, 128, 128), torch.zeros(2, 128)
        for odd, count in ((0, 101), (1, 100)):
            turns = n * (2 * torch.arange(count) + odd) % FFT_SAMPLES  # exact: angles of whole 400ths
            angle = turns.double() * (2 * math.pi / FFT_SAMPLES)
            tables[2 * odd, :101, :count], tables[2 * odd + 1, :101, :count] = angle.cos(), angle.sin()
            tables[2 * odd, 100, :count] *= 1 - odd  # cos of an odd quarter turn is 0, not 6e-17
            tables[2 * odd + 1, 100, :count] *= odd
        window = torch.hann_window(FFT_SAMPLES, dtype=torch.float64)
        windows[0, :101], windows[1, :101] = window[:101], window[100:201].flip(0)
        windows[1, 100] = 0  # n = 100 is its own mirror
        return tables.to(device), windows.to(device)


@triton.jit
def _sample(pcm, tail, r, samples, before, mask):
    """Sample r behind the first one of this call; mirrored at both ends of the stream, as often as needed.

    before: samples before this call (or 1024, if more). pcm, tail: this stream's.
    """
    r = tl.where(r < -before, -r - 2 * before, r)
    r = tl.where(r >= samples, 2 * samples - 2 - r, r)
    r = tl.where(r < -before, -r - 2 * before, r)
    new = tl.load(pcm + r, mask=mask & (r >= 0), other=0.0)
    return new + tl.load(tail + TAIL + r, mask=mask & (r < 0), other=0.0)


@triton.jit
def _square(re, im):
    return re * re + im * im


@triton.jit(do_not_specialize=["samples", "columns", "streams"])
def _mel_power(
    pcm, slots, tail, seen, filters, tables, windows, scratch, pcm_stride, samples, columns, streams, bins,
    WAIT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_FRAMES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """columns: frames that are transformed; with edge="reflect" the previous call's last one comes first."""
    begin(DEPENDENT)
    stream, part = tl.program_id(0), tl.program_id(2)
    frame = tl.program_id(1) * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
    slot = tl.load(slots + stream)
    before = tl.minimum(tl.load(seen + slot), 1024).to(tl.int32)
    own_pcm = pcm + stream.to(tl.int64) * pcm_stride
    own_tail = tail + slot * TAIL
    lead: tl.constexpr = LEAD if WAIT else TAIL
    origin = (frame * HOP - lead)[:, None]
    there = (frame < columns)[:, None]
    c = tl.arange(0, BLOCK_BINS)[None, :]
    power = tl.zeros((BLOCK_FRAMES, BLOCK_BINS), tl.float32)

    for j_start in range(part * (PADDED // SPLITS), (part + 1) * (PADDED // SPLITS), BLOCK_COLUMNS):
        j = j_start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        re_even = tl.zeros((BLOCK_FRAMES, BLOCK_COLUMNS), tl.float32)
        im_even, re_odd, im_odd = re_even, re_even, re_even
        for n_start in range(0, FOLDED, BLOCK_DEPTH):
            n = n_start + tl.arange(0, BLOCK_DEPTH)[None, :]
            outer = there & (n >= 1) & (n < FOLDED)
            inner = there & (n < FOLDED - 1)
            window, mirrored = tl.load(windows + n), tl.load(windows + PADDED + n)
            a = _sample(own_pcm, own_tail, origin + n, samples, before, outer)
            d = _sample(own_pcm, own_tail, origin + 400 - n, samples, before, outer)
            b = _sample(own_pcm, own_tail, origin + 200 - n, samples, before, inner)
            e = _sample(own_pcm, own_tail, origin + 200 + n, samples, before, inner & (n >= 1))
            even, even_far = window * (a + d), mirrored * (b + e)
            odd, odd_far = window * (a - d), mirrored * (b - e)
            at = tables + tl.trans(n) * PADDED + j
            size: tl.constexpr = PADDED * PADDED
            re_even = dot(even + even_far, tl.load(at), re_even)
            im_even = dot(odd - odd_far, tl.load(at + size), im_even)
            re_odd = dot(even - even_far, tl.load(at + 2 * size), re_odd)
            im_odd = dot(odd + odd_far, tl.load(at + 3 * size), im_odd)
        block = tl.zeros((BLOCK_FRAMES, BLOCK_BINS), tl.float32)
        weight = filters + c * SPECTRUM + 2 * tl.trans(j)
        used = (c < bins) & (tl.trans(j) < FOLDED)
        block = dot(_square(re_even, im_even), tl.load(weight, mask=used, other=0.0), block)
        used &= tl.trans(j) < FOLDED - 1
        power += dot(_square(re_odd, im_odd), tl.load(weight + 1, mask=used, other=0.0), block)

    row = ((part * streams + stream).to(tl.int64) * columns + frame)[:, None]
    tl.store(scratch + row * bins + c, power, mask=there & (c < bins))


@triton.jit
def _log10(x):
    """log10 of x >= FLOOR in float32, within an ulp of 1: exponent and mantissa apart, for the device's
    base-2 logarithm is exact to 2^-22 of 1, which far from 1 is less than the last place.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23  # of a mantissa in [0.75, 1.5)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    y = exponent.to(tl.float32) * LOG10_2 + tl.log2(mantissa) * LOG10_2
    return tl.where(x < float("inf"), y, x)  # inf and NaN stay


@triton.jit
def _log_power(scratch, stream, frame, c, streams, columns, bins, mask, SPLITS: tl.constexpr):
    """log10 mel power [frames, bins] of a stream, summed over the parts of the spectrum in order."""
    power = tl.zeros(mask.shape, tl.float32)
    for part in tl.static_range(SPLITS):
        row = ((part * streams + stream).to(tl.int64) * columns + frame)[:, None]
        power += tl.load(scratch + row * bins + c, mask=mask, other=0.0)
    return _log10(tl.where(power < FLOOR, FLOOR, power))


@triton.jit
def _louder(a, b):
    """The larger one; NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _loudest(y, mask):
    """The largest y [frames, bins] under mask; NaN if there is one among them."""
    spoilt = tl.max(tl.max((mask & (y != y)).to(tl.int32), 1), 0)
    largest = tl.max(tl.max(tl.where(mask, y, float("-inf")), 1), 0)
    return tl.where(spoilt != 0, float("nan"), largest)


@triton.jit(do_not_specialize=["samples", "columns", "streams"])
def _mel_frames(
    pcm, slots, tail, peak, seen, scratch, frames, pcm_stride, samples, columns, streams, bins,
    WAIT: tl.constexpr, RUNNING: tl.constexpr, SPLITS: tl.constexpr, BLOCK_FRAMES: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_TAIL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    stream = tl.program_id(0)
    slot = tl.load(slots + stream)
    start = tl.load(seen + slot)
    c = tl.arange(0, BLOCK_BINS)[None, :]
    index = tl.arange(0, BLOCK_FRAMES)
    extra: tl.constexpr = 0 if WAIT else 1  # columns before the first new frame

    top = tl.load(peak + slot)
    if RUNNING:
        final, last = top, float("-inf")  # of frames that stay; of the one whose end is mirrored
        for first in range(0, columns, BLOCK_FRAMES):
            frame = first + index
            real = (frame < columns)[:, None] & (c < bins)
            y = _log_power(scratch, stream, frame, c, streams, columns, bins, real, SPLITS)
            if WAIT:
                final = _louder(final, _loudest(y, real))
            else:
                begun = ((frame > 0) | (tl.zeros_like(frame) + start > 0))[:, None]
                stays = (frame < columns - 1)[:, None]
                final = _louder(final, _loudest(y, real & begun & stays))
                last = _louder(last, _loudest(y, real & (frame == columns - 1)[:, None]))
        tl.store(peak + slot, final)
        top = _louder(final, last)

    out = frames + stream.to(tl.int64) * (columns - extra) * bins
    for first in range(0, columns, BLOCK_FRAMES):
        frame = first + index
        real = (frame < columns)[:, None] & (c < bins)
        y = _log_power(scratch, stream, frame, c, streams, columns, bins, real, SPLITS)
        value = (_louder(y, tl.zeros_like(y) + (top - RANGE)) + 4.0) * 0.25
        tl.store(out + (frame - extra)[:, None] * bins + c, value, mask=real & (frame >= extra)[:, None])

    place = samples + tl.arange(0, BLOCK_TAIL)  # in the tail and this call's samples, one behind the other
    kept = tl.arange(0, BLOCK_TAIL) < TAIL
    old = tl.load(tail + slot * TAIL + place, mask=kept & (place < TAIL), other=0.0)
    new = pcm + stream.to(tl.int64) * pcm_stride + place - TAIL
    value = old + tl.load(new, mask=kept & (place >= TAIL), other=0.0)
    tl.debug_barrier()  # all of the old tail is read
    tl.store(tail + slot * TAIL + tl.arange(0, BLOCK_TAIL), value, mask=kept)
    tl.store(seen + slot, start + samples)


def spectrum_splits(programs: int, processors: int) -> int:
    """Into how many parts the spectrum is cut: all of its blocks, where the processors have room for them."""
    parts = 128 // COLUMN_BLOCK
    return parts if parts * programs <= 2 * processors else 1


def mel_triton(
    pcm: Tensor,
    slots: Tensor,
    tail: Tensor,
    peak: Tensor,
    seen: Tensor,
    filters: Tensor,
    bands: Tensor,
    edge: str = "reflect",
    clamp: str = "running",
) -> Tensor:
    """`mel_ref` on a GPU: pcm float32 [B, S], slots int64 [B], state in place -> frames [B, S // 160, C].

    `bands` is not needed: the filters are multiplied as a matrix.
    """
    check_mel((pcm, slots, tail, peak, seen, filters, bands), edge, clamp)
    if pcm.device.type == "cpu":
        _check_slots(slots, seen, edge)
    accept("mel", pcm=pcm, slots=slots)
    for name, state in (("tail", tail), ("peak", peak), ("seen", seen)):
        if not state.is_contiguous():
            raise ValueError(
                f"mel: {name} is changed in place and must be contiguous, its strides are {state.stride()}"
            )
    pcm = pcm if pcm.stride(1) == 1 else pcm.contiguous()
    slots, filters = slots.contiguous(), filters.contiguous()
    streams, samples = pcm.shape
    bins, fresh = filters.shape[0], samples // HOP_SAMPLES
    wait = edge == EDGES[1]
    columns = fresh + (0 if wait else 1)
    config = dict(choose("mel", pcm.device, streams=streams))
    tiles = triton.cdiv(columns, config["BLOCK_FRAMES"])
    splits = spectrum_splits(streams * tiles, processors(pcm.device))
    frames = torch.empty((streams, fresh, bins), dtype=torch.float32, device=pcm.device)
    scratch = torch.empty((splits, streams, columns, bins), dtype=torch.float32, device=pcm.device)
    sizes = (pcm.stride(0), samples, columns, streams, bins)
    shared = {"WAIT": wait, "SPLITS": splits, "BLOCK_BINS": max(16, triton.next_power_of_2(bins))}
    launch(
        _mel_power, (streams, tiles, splits), pcm, slots, tail, seen, filters, *_tables(pcm.device), scratch,
        *sizes, BLOCK_COLUMNS=COLUMN_BLOCK, **shared, **config,
    )  # fmt: skip
    launch(
        _mel_frames, (streams,), pcm, slots, tail, peak, seen, scratch, frames, *sizes,
        RUNNING=clamp == "running", BLOCK_FRAMES=16, BLOCK_TAIL=triton.next_power_of_2(TAIL_SAMPLES),
        warps=8, **shared,
    )  # fmt: skip
    return frames
