"""sample: the next token of each row: greedy, or temperature, top-k, nucleus and an inverted CDF in id order.

    _peaks     each chunk's largest legal logit, its first id, and whether one is not finite
    _narrow_k  the next 4 bits of the k-th largest logit        once for every 4 bits of a logit
    _narrow_p  the next 4 bits of the nucleus' smallest logit   the same
    _tally     each chunk's mass above that threshold, and how many logits equal it
    _draw      the chunk in which the CDF passes u, then the token

No sort: what top-k and top-p keep is {logit > t} and the first few ids of {logit == t}. The threshold t is
found 16-way: logits are mapped to integers of the same order, and each pass sums counts (or masses) of the 16
values of the next 4 bits below the bits that are known. 151,936 float32 logits are 8 passes for k and 8 for
p, bfloat16 ones 4 and 4.

Who owns what: a program owns CHUNK logits of a row; every one of them adds up its row's partial sums of the
pass before by itself, so no pass needs a kernel in between. Bytes moved: the logits once a pass, from L2.
Why this version: one block a row would take 70 passes of 0.6 MB through one processor, some 400 us; 75 blocks
a row take a launch's 2 us a pass. All sums run in a fixed order in float64, so a row draws the same token in
any batch, and the one that the definition draws unless u lies within 1e-15 of a step of the CDF. Rows that
are greedy, or have no top-k or top-p, leave the passes that they do not need at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.sample import NONFINITE
from ..ops.sample import _check as check_sample
from .device import begin
from .launch import accept, launch, rows_apart
from .tuning import choose

_NONFINITE = tl.constexpr(NONFINITE)
STEP_BITS = 4
BINS = tl.constexpr(2**STEP_BITS)
TINY = tl.constexpr(1e-300)  # a nucleus of mass 0 still holds the most likely token
INT_FIELDS, FLOAT_FIELDS = tl.constexpr(3), tl.constexpr(2)  # of a row's state between passes


@triton.jit
def _legal(logits, banned, phase, row, index, vocab, stride):
    """Logits at `index` in their own dtype; -inf where banned or outside, and no negative zero."""
    inside = index < vocab
    x = tl.load(logits + row.to(tl.int64) * stride + index, mask=inside, other=float("-inf"))
    held = tl.load(banned + tl.load(phase + row) * vocab + index, mask=inside, other=1)
    x = tl.where(x == 0.0, tl.zeros_like(x), x)
    return tl.where(held != 0, tl.full(x.shape, float("-inf"), x.dtype), x)


@triton.jit
def _key(x, BITS: tl.constexpr):
    """An integer in [0, 2^BITS) of the same order."""
    bits = x.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + (1 << (BITS - 1)))


@triton.jit
def _value(key, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """The logit of a key, float64."""
    half: tl.constexpr = 1 << (BITS - 1)
    bits = tl.where(key >= half, key - half, -1 - key).to(tl.int16 if BITS == 16 else tl.int32)
    return bits.to(DTYPE, bitcast=True).to(tl.float32).to(tl.float64)


@triton.jit
def _weight(x, peak, temperature):
    """e^((x - peak) / T), float64."""
    return tl.exp((x.to(tl.float32).to(tl.float64) - peak) / temperature)


@triton.jit
def _peak(peaks, row, chunks, BLOCK_CHUNKS: tl.constexpr):
    """The row's largest logit, float64; NaN where one is not finite."""
    c = tl.arange(0, BLOCK_CHUNKS)
    x = tl.load(peaks + row * chunks + c, mask=c < chunks, other=float("-inf")).to(tl.float64)
    spoilt = tl.max((x != x).to(tl.int32), 0)
    return tl.where(spoilt != 0, float("nan"), tl.max(tl.where(x == x, x, float("-inf")), 0))


@triton.jit
def _draws(peak, temperature):
    """Whether a row draws: not greedy, and its logits are finite."""
    return (temperature > 0.0) & (tl.abs(peak) < float("inf"))


@triton.jit
def _bins(partial, row, chunks, BLOCK_CHUNKS: tl.constexpr):
    """The sums of the 16 values of the last pass over all chunks of a row."""
    c, d = tl.arange(0, BLOCK_CHUNKS)[:, None], tl.arange(0, BINS)[None, :]
    at = partial + (row * chunks + c) * BINS + d
    return tl.sum(tl.load(at, mask=(c < chunks) & (d >= 0), other=0), 0)


@triton.jit
def _above(sums):
    """For each value: the sum over the larger ones."""
    return tl.cumsum(sums, 0, reverse=True) - sums


@triton.jit
def _at(vector, d):
    """vector[d] of 16."""
    return tl.sum(tl.where(tl.arange(0, BINS) == d, vector, tl.zeros_like(vector)), 0)


@triton.jit
def _finish_k(ints, counts, row, chunks, k, BLOCK_CHUNKS: tl.constexpr):
    """(bits of the k-th largest key so far, how many keys lie above them), one pass on."""
    prefix, above = tl.load(ints + row * INT_FIELDS), tl.load(ints + row * INT_FIELDS + 1)
    sums = _bins(counts, row, chunks, BLOCK_CHUNKS).to(tl.int64)
    over = above + _above(sums)
    d = tl.min(tl.where((over < k) & (sums > 0), tl.arange(0, BINS), BINS - 1), 0)
    return prefix * BINS + d, _at(over, d)


@triton.jit(do_not_specialize=["chunks"])
def _peaks(
    logits, banned, phase, peaks, places, vocab, stride, chunks, CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row, chunk = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _legal(logits, banned, phase, row, index, vocab, stride).to(tl.float32)
    spoilt = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    peak = tl.max(tl.where(x == x, x, float("-inf")), 0)
    first = tl.min(tl.where(x == peak, index, vocab), 0)
    tl.store(peaks + row * chunks + chunk, tl.where(spoilt != 0, float("nan"), peak))
    tl.store(places + row * chunks + chunk, first)


@triton.jit(do_not_specialize=["chunks", "shift"])
def _narrow_k(
    logits, banned, phase, temperature, top_k, peaks, ints_in, ints_out, counts_in, counts_out, vocab, stride,
    chunks, shift, FIRST: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The pass for the bits `shift`..`shift` + 3 of the k-th largest key. ints: [R, 3] = (the bits above, how
    many keys lie above those, -).
    """
    begin(DEPENDENT)
    row, chunk = tl.program_id(0), tl.program_id(1)
    k = tl.minimum(tl.load(top_k + row), vocab)
    peak = _peak(peaks, row, chunks, BLOCK_CHUNKS)
    if _draws(peak, tl.load(temperature + row)) & (k > 0):
        prefix, above = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
        if not FIRST:
            prefix, above = _finish_k(ints_in, counts_in, row, chunks, k, BLOCK_CHUNKS)
        if chunk == 0:
            tl.store(ints_out + row * INT_FIELDS, prefix)
            tl.store(ints_out + row * INT_FIELDS + 1, above)
        d = tl.arange(0, BINS)[None, :]
        sums = tl.zeros((BINS,), tl.int32)
        for start in range(0, CHUNK, BLOCK):
            index = chunk * CHUNK + start + tl.arange(0, BLOCK)
            key = _key(_legal(logits, banned, phase, row, index, vocab, stride), BITS)
            match = (index < vocab) & ((key >> (shift + 4)) == prefix)
            digit = tl.where(match, (key >> shift) & (BINS - 1), -1).to(tl.int32)
            sums += tl.sum((digit[:, None] == d).to(tl.int32), 0)
        tl.store(counts_out + (row * chunks + chunk) * BINS + tl.arange(0, BINS), sums)


@triton.jit
def _finish_p(
    ints, floats, masses, row, chunks, peak, temperature, top_p, shift, DTYPE: tl.constexpr,
    BITS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """(bits of the nucleus' smallest key so far, mass above them, mass of the nucleus, t_k, ties at t_k), one
    pass on. Logits equal to the k-th largest are not in the masses: `ties` of them are added here.
    """
    prefix, t_k = tl.load(ints + row * INT_FIELDS), tl.load(ints + row * INT_FIELDS + 1)
    ties = tl.load(ints + row * INT_FIELDS + 2)
    above, target = tl.load(floats + row * FLOAT_FIELDS), tl.load(floats + row * FLOAT_FIELDS + 1)
    sums = _bins(masses, row, chunks, BLOCK_CHUNKS)
    tied = tl.exp((_value(tl.maximum(t_k, 0), DTYPE, BITS) - peak) / temperature) * ties.to(tl.float64)
    here = (ties > 0) & ((t_k >> (shift + 4)) == prefix)
    digit = tl.where(here, (t_k >> shift) & (BINS - 1), -1)
    sums += tl.where(tl.arange(0, BINS) == digit, tied, 0.0)
    if shift == BITS - 4:  # the first pass: its sum is all that top-k keeps
        target = tl.maximum(top_p.to(tl.float64) * tl.sum(sums, 0), TINY)
    over = above + _above(sums)
    d = tl.min(tl.where((over < target) & (sums > 0.0), tl.arange(0, BINS), BINS - 1), 0)
    return prefix * BINS + d, _at(over, d), target, t_k, ties


@triton.jit
def _kept_by_k(ints, counts, top_k, row, chunks, vocab, BLOCK_CHUNKS: tl.constexpr):
    """(t_k, ties): top-k keeps the keys above t_k and the first `ties` of those equal to it."""
    k = tl.minimum(tl.load(top_k + row), vocab)
    t_k, ties = tl.full((), -1, tl.int64), tl.zeros((), tl.int64)
    if k > 0:
        t_k, above = _finish_k(ints, counts, row, chunks, k, BLOCK_CHUNKS)
        ties = k - above
    return t_k, ties


@triton.jit(do_not_specialize=["chunks", "shift"])
def _narrow_p(
    logits, banned, phase, temperature, top_k, top_p, peaks, ints_k, counts, ints_in, ints_out, floats_in,
    floats_out, masses_in, masses_out, vocab, stride, chunks, shift, FIRST: tl.constexpr, BITS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The pass for the bits `shift`..`shift` + 3 of the smallest key of the nucleus. ints: [R, 3] = (the bits
    above, t_k, ties), floats: [R, 2] = (the mass above those, the mass that the nucleus must reach).
    """
    begin(DEPENDENT)
    row, chunk = tl.program_id(0), tl.program_id(1)
    heat, share = tl.load(temperature + row).to(tl.float64), tl.load(top_p + row)
    peak = _peak(peaks, row, chunks, BLOCK_CHUNKS)
    if _draws(peak, heat) & (share < 1.0):
        prefix, above, target = tl.zeros((), tl.int64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
        if not FIRST:
            prefix, above, target, t_k, ties = _finish_p(
                ints_in, floats_in, masses_in, row, chunks, peak, heat, share, shift + 4,
                logits.dtype.element_ty, BITS, BLOCK_CHUNKS,
            )  # fmt: skip
        else:
            t_k, ties = _kept_by_k(ints_k, counts, top_k, row, chunks, vocab, BLOCK_CHUNKS)
        if chunk == 0:
            tl.store(ints_out + row * INT_FIELDS, prefix)
            tl.store(ints_out + row * INT_FIELDS + 1, t_k)
            tl.store(ints_out + row * INT_FIELDS + 2, ties)
            tl.store(floats_out + row * FLOAT_FIELDS, above)
            tl.store(floats_out + row * FLOAT_FIELDS + 1, target)
        d = tl.arange(0, BINS)[None, :]
        sums = tl.zeros((BINS,), tl.float64)
        for start in range(0, CHUNK, BLOCK):
            index = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = _legal(logits, banned, phase, row, index, vocab, stride)
            key = _key(x, BITS)
            match = (index < vocab) & (key > t_k) & ((key >> (shift + 4)) == prefix)
            digit = tl.where(match, (key >> shift) & (BINS - 1), -1).to(tl.int32)
            mass = tl.where(match, _weight(x, peak, heat), 0.0)
            sums += tl.sum(tl.where(digit[:, None] == d, mass[:, None], 0.0), 0)
        tl.store(masses_out + (row * chunks + chunk) * BINS + tl.arange(0, BINS), sums)


@triton.jit(do_not_specialize=["chunks"])
def _tally(
    logits, banned, phase, temperature, top_k, top_p, peaks, ints_k, counts, ints_p, floats_p, masses,
    ints_out, above_out, equal_out, vocab, stride, chunks, BITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The final threshold (t, how many ties) [R, 3], and each chunk's mass above t and count of t."""
    begin(DEPENDENT)
    row, chunk = tl.program_id(0), tl.program_id(1)
    heat, share = tl.load(temperature + row).to(tl.float64), tl.load(top_p + row)
    peak = _peak(peaks, row, chunks, BLOCK_CHUNKS)
    if _draws(peak, heat):
        if share < 1.0:
            t, above, target, t_k, ties_k = _finish_p(
                ints_p, floats_p, masses, row, chunks, peak, heat, share, 0, logits.dtype.element_ty, BITS,
                BLOCK_CHUNKS,
            )  # fmt: skip
            each = tl.exp((_value(t, logits.dtype.element_ty, BITS) - peak) / heat)
            wanted = tl.ceil((target - above) / each)  # the first one begins below the target
            ties = tl.minimum(tl.maximum(wanted, 1.0), 1.0 * vocab).to(tl.int64)
            ties = tl.where(t == t_k, tl.minimum(ties, ties_k), ties)
        else:
            t, ties = _kept_by_k(ints_k, counts, top_k, row, chunks, vocab, BLOCK_CHUNKS)
        if chunk == 0:
            tl.store(ints_out + row * INT_FIELDS, t)
            tl.store(ints_out + row * INT_FIELDS + 1, ties)
        mass, equal = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
        for start in range(0, CHUNK, BLOCK):
            index = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = _legal(logits, banned, phase, row, index, vocab, stride)
            key = _key(x, BITS)
            mass += tl.where((index < vocab) & (key > t), _weight(x, peak, heat), 0.0)
            equal += ((index < vocab) & (key == t)).to(tl.int32)
        tl.store(above_out + row * chunks + chunk, tl.sum(mass, 0))
        tl.store(equal_out + row * chunks + chunk, tl.sum(equal, 0))


@triton.jit
def _uniform(seed, counter):
    """A uniform number in [0, 1) of (seed, counter): two rounds of SplitMix64's finaliser."""
    z = seed.to(tl.uint64) * 0x9E3779B97F4A7C15 + counter.to(tl.uint64)
    for _ in tl.static_range(2):
        z = z + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
    return (z >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _first_over(cdf, mass, level, SIZE: tl.constexpr):
    """The first place where a CDF [SIZE] exceeds `level`; where rounding let none, the last one with mass."""
    i = tl.arange(0, SIZE)
    first = tl.min(tl.where((cdf > level) & (mass > 0.0), i, SIZE), 0)
    last = tl.max(tl.where(mass > 0.0, i, 0), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit(do_not_specialize=["chunks"])
def _draw(
    logits, banned, phase, temperature, seed, counter, peaks, places, ints, above, equal, ids, vocab, stride,
    chunks, BITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    begin(DEPENDENT)
    row = tl.program_id(0)
    heat = tl.load(temperature + row).to(tl.float64)
    peak = _peak(peaks, row, chunks, BLOCK_CHUNKS)
    c = tl.arange(0, BLOCK_CHUNKS)
    real = c < chunks
    highest = tl.load(peaks + row * chunks + c, mask=real, other=float("-inf")).to(tl.float64)
    place = tl.load(places + row * chunks + c, mask=real, other=0)
    token = tl.min(tl.where(highest == peak, place, vocab), 0)
    if _draws(peak, heat):
        t, ties = tl.load(ints + row * INT_FIELDS), tl.load(ints + row * INT_FIELDS + 1)
        each = tl.exp((_value(tl.maximum(t, 0), logits.dtype.element_ty, BITS) - peak) / heat)
        count = tl.load(equal + row * chunks + c, mask=real, other=0).to(tl.int64)
        kept = tl.minimum(tl.maximum(ties - (tl.cumsum(count, 0) - count), 0), count)
        mass = tl.load(above + row * chunks + c, mask=real, other=0.0)
        mass += tl.where(kept > 0, kept.to(tl.float64) * each, 0.0)
        level = _uniform(tl.load(seed + row), tl.load(counter + row)) * tl.sum(mass, 0)
        chunk = _first_over(tl.cumsum(mass, 0), mass, level, BLOCK_CHUNKS)
        before = tl.sum(tl.where(c < chunk, mass, 0.0), 0)
        allowed = tl.sum(tl.where(c == chunk, kept, 0), 0)

        index = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _legal(logits, banned, phase, row, index, vocab, stride)
        key = _key(x, BITS)
        tie = (index < vocab) & (key == t)
        chosen = (key > t) | (tie & (tl.cumsum(tie.to(tl.int64), 0) <= allowed))
        weight = tl.where(chosen & (index < vocab), _weight(x, peak, heat), 0.0)
        token = chunk * CHUNK + _first_over(before + tl.cumsum(weight, 0), weight, level, CHUNK)
    finite = tl.abs(peak) < float("inf")
    tl.store(ids + row, tl.where(finite, token, _NONFINITE).to(tl.int64))


def sample_triton(
    logits: Tensor,
    banned: Tensor,
    phase: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> Tensor:
    """`sample_ref` on a GPU: logits [R, V], banned bool [phases, V], phase int64 [R], temperature and top_p
    float32 [R], top_k, seed and counter int64 [R] -> ids int64 [R]; the same tokens.
    """
    check_sample(logits, banned, phase, temperature, top_k, top_p, seed, counter)
    accept("sample", logits=logits, banned=banned, phase=phase, temperature=temperature, top_k=top_k)
    options = (phase, temperature, top_k, top_p, seed, counter)
    phase, temperature, top_k, top_p, seed, counter = (t.contiguous() for t in options)
    rows, vocab = logits.shape
    logits, banned = rows_apart(logits), banned.contiguous()
    config = dict(choose("sample", logits.device, rows=rows, vocab=vocab))
    size, block = config.pop("CHUNK"), config.pop("BLOCK")
    chunks = triton.cdiv(vocab, size)
    bits = 8 * logits.element_size()
    levels, bins = bits // STEP_BITS, 2**STEP_BITS

    def scratch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    ids = scratch(rows, dtype=torch.int64)
    peaks, places = scratch(rows, chunks, dtype=torch.float32), scratch(rows, chunks, dtype=torch.int32)
    above, equal = scratch(rows, chunks), scratch(rows, chunks, dtype=torch.int32)
    counts, masses = scratch(2, rows, chunks, bins, dtype=torch.int32), scratch(2, rows, chunks, bins)
    ints_k, ints_p = (scratch(2, rows, 3, dtype=torch.int64) for _ in range(2))
    floats, final = scratch(2, rows, 2), scratch(rows, 3, dtype=torch.int64)

    grid, source, sums = (rows, chunks), (logits, banned, phase), (vocab, logits.stride(0), chunks)
    shared = {"BITS": bits, "CHUNK": size, "BLOCK_CHUNKS": triton.next_power_of_2(chunks), **config}
    launch(_peaks, grid, *source, peaks, places, *sums, CHUNK=size, **config)
    for level in range(levels):
        old, new = (level + 1) % 2, level % 2
        launch(
            _narrow_k, grid, *source, temperature, top_k, peaks, ints_k[old], ints_k[new], counts[old],
            counts[new], *sums, bits - (level + 1) * STEP_BITS, FIRST=level == 0, BLOCK=block, **shared,
        )  # fmt: skip
    last = (levels + 1) % 2
    by_k = (ints_k[last], counts[last])
    for level in range(levels):
        old, new = (level + 1) % 2, level % 2
        launch(
            _narrow_p, grid, *source, temperature, top_k, top_p, peaks, *by_k, ints_p[old], ints_p[new],
            floats[old], floats[new], masses[old], masses[new], *sums, bits - (level + 1) * STEP_BITS,
            FIRST=level == 0, BLOCK=block, **shared,
        )  # fmt: skip
    launch(
        _tally, grid, *source, temperature, top_k, top_p, peaks, *by_k, ints_p[last], floats[last],
        masses[last], final, above, equal, *sums, BLOCK=block, **shared,
    )  # fmt: skip
    launch(
        _draw, (rows,), *source, temperature, seed, counter, peaks, places, final, above, equal, ids, *sums,
        **shared,
    )  # fmt: skip
    return ids
