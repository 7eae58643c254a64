"""The op `paged_attention`: every implementation against the definition, the definition against numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from scipy.special import softmax
from torch import Generator, Tensor

from fastloop.ops import REGISTRY, use_backend
from fastloop.ops.paged_attention import paged_attention_ref
from fastloop.ops.rope_append import rope_append_ref, rotate
from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import FLOAT8, Arguments, Case, paged_attention_case
from fastloop.testing.selfcheck import widened
from fastloop.testing.tolerance import relative_error

seeds = st.integers(0, 2**32 - 1)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dataclass(frozen=True)
class Batch:
    """Sequences of any kind: listeners, speakers, speculation; with and without a gap; padded ones."""

    rows: list[int]
    lens: list[int]
    gaps: list[tuple[int, int]]

    def case(self, seed: int, **dims: Any) -> Case:
        return self.draw(**dims)(seeded(seed))

    def draw(self, **dims: Any) -> Callable[[Generator], Case]:
        return functools.partial(paged_attention_case, rows=self.rows, lens=self.lens, gaps=self.gaps, **dims)


@st.composite
def batches(draw: st.DrawFn, least: int = 1, most: int = 5, least_rows: int = 0) -> Batch:
    rows, lens, gaps = [], [], []
    for _ in range(draw(st.integers(least, most))):
        count = draw(st.sampled_from([n for n in (0, 1, 1, 2, 13, 13, 26, 64) if n >= least_rows]))
        context = draw(st.integers(0, 70))
        begin = draw(st.integers(0, context))
        rows.append(count)
        lens.append(context + count)
        gaps.append((begin, draw(st.integers(begin, context))))
    return Batch(rows, lens, gaps)


dims = st.fixed_dictionaries(
    {
        "page": st.sampled_from([1, 3, 8, 16, 64]),
        "kv_heads": st.integers(1, 3),
        "head_width": st.one_of(st.sampled_from([64, 128]), st.integers(1, 40)),
    }
)
repeats = st.sampled_from([1, 2, 7, 8])


@every_dtype
@given(seed=seeds, batch=batches(), repeat=repeats, dims=dims)
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    batch: Batch,
    repeat: int,
    dims: dict[str, int],
) -> None:
    """Slots of nobody and of the gap are NaN; entries behind the last page are no page."""
    draw = batch.draw(heads=repeat * dims["kv_heads"], dtype=dtype, **dims)
    case = draw(seeded(seed))
    assume(not implementation.refusal(case.arguments))  # of a width of heads
    assert_right(implementation, case, draw)


@given(seed=seeds, batch=batches())
def test_pages_of_another_dtype(implementation: Implementation, seed: int, batch: Batch) -> None:
    draw = batch.draw(page_dtype=torch.bfloat16)
    assert_right(implementation, draw(seeded(seed)), draw)


@every_dtype
@given(seed=seeds, batch=batches())
def test_large_pages_without_gaps(
    implementation: Implementation, dtype: torch.dtype, seed: int, batch: Batch
) -> None:
    """Some backends read these where they lie, and others not."""
    draw = replace(batch, gaps=[(0, 0)] * len(batch.rows)).draw(page=256, dtype=dtype)
    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds)
def test_long_contexts(implementation: Implementation, seed: int) -> None:
    batch = Batch([13, 1, 3], [3000, 1029, 4096], [(40, 51), (0, 0), (5, 4000)])
    assert_right(implementation, batch.case(seed, page=64, heads=2, kv_heads=1))


def dense(a: Arguments, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q [n, H, K], k and v [s, G, K] of the slots outside the gap, and their numbers [s], of sequence b."""
    page = a["k_pages"].shape[1]
    first, last = (int(a["row_starts"][i]) for i in (b, b + 1))
    begin, end = a["gaps"][b].tolist()
    slots = np.array([s for s in range(int(a["kv_lens"][b])) if not begin <= s < end], dtype=np.int64)
    where = a["block_table"][b].numpy()[slots // page], slots % page
    return a["q"][first:last].numpy(), a["k_pages"].numpy()[where], a["v_pages"].numpy()[where], slots


def in_numpy(**a: Tensor) -> np.ndarray:
    """Row by row and head by head over exactly what the row sees."""
    out = np.empty(a["q"].shape)
    repeat = a["q"].shape[1] // a["k_pages"].shape[2]
    for b in range(len(a["kv_lens"])):
        q, k, v, slots = dense(a, b)
        for i, row in enumerate(q):
            own = int(a["kv_lens"][b]) - len(q) + i
            for h, query in enumerate(row):
                keys, values = (x[slots <= own, h // repeat] for x in (k, v))
                weights = softmax(keys @ query / np.sqrt(len(query)))
                out[int(a["row_starts"][b]) + i, h] = weights @ values
    return out


@given(seed=seeds, batch=batches(most=3), repeat=repeats, page=st.sampled_from([1, 3, 8, 64]))
def test_definition(seed: int, batch: Batch, repeat: int, page: int) -> None:
    case = batch.case(seed, heads=2 * repeat, kv_heads=2, head_width=6, page=page)
    assert_defined("paged_attention", case, in_numpy)


@every_dtype
@given(seed=seeds, count=st.integers(1, 64), page=st.sampled_from([3, 8, 64]))
def test_equals_torch_on_a_whole_sequence(
    implementation: Implementation, dtype: torch.dtype, seed: int, count: int, page: int
) -> None:
    """Nothing in the cache before: plain causal attention."""
    a = Batch([count], [count], [(0, 0)]).case(seed, page=page, dtype=dtype).arguments
    q, k, v = (torch.from_numpy(x)[None].transpose(1, 2) for x in dense(floats(a), 0)[:3])
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_near(theirs[0].transpose(0, 1).to(dtype), "paged_attention", a)
    assert_near(implementation(**a), "paged_attention", a)


def floats(a: Arguments) -> Arguments:
    """numpy knows no bfloat16."""
    return a | {name: a[name].float() for name in ("q", "k_pages", "v_pages")}


def only(a: Arguments, b: int) -> Arguments:
    """The call with sequence b alone."""
    first, last = (int(a["row_starts"][i]) for i in (b, b + 1))
    part = {name: a[name][b : b + 1] for name in ("block_table", "kv_lens", "gaps")}
    starts = torch.tensor([0, last - first], dtype=torch.int32)
    return a | part | {"q": a["q"][first:last], "row_starts": starts}


@every_dtype
@given(seed=seeds, batch=batches())
def test_a_sequence_alone_and_in_a_batch(
    implementation: Implementation, dtype: torch.dtype, seed: int, batch: Batch
) -> None:
    a = batch.case(seed, dtype=dtype).arguments
    alone = [implementation(**only(a, b)) for b in range(len(batch.rows))]
    assert_near(torch.cat(alone), "paged_attention", a)


@given(seed=seeds, batch=batches(least_rows=1))
def test_row_by_row_and_all_at_once(implementation: Implementation, seed: int, batch: Batch) -> None:
    """Streaming equals batch: a row's result does not depend on the rows behind it."""
    a = batch.case(seed).arguments
    steps = []
    for b, count in enumerate(batch.rows):
        for i in range(count):
            one = only(a, b)
            one["q"] = one["q"][i : i + 1]
            one["kv_lens"] = one["kv_lens"] - (count - 1 - i)
            one["row_starts"] = torch.tensor([0, 1], dtype=torch.int32)
            steps.append(implementation(**one))
    assert_near(torch.cat(steps), "paged_attention", a)


@every_dtype
@given(seed=seeds, batch=batches(), page=st.sampled_from([1, 3, 8]))
def test_where_the_pages_lie_does_not_matter(
    implementation: Implementation, dtype: torch.dtype, seed: int, batch: Batch, page: int
) -> None:
    """To the bit."""
    a = batch.case(seed, page=page, dtype=dtype).arguments
    order = torch.randperm(len(a["k_pages"]), generator=seeded(seed + 1))  # new place -> old page
    place = order.argsort().int()
    real = a["block_table"] < len(order)
    moved = a | {name: a[name][order] for name in ("k_pages", "v_pages")}
    moved["block_table"] = torch.where(real, place[a["block_table"].where(real, 0)], a["block_table"])
    assert torch.equal(implementation(**moved), implementation(**a))


@every_dtype
@given(seed=seeds, batch=batches(), page=st.sampled_from([1, 3, 8]))
def test_a_gap_is_as_if_it_were_not_there(
    implementation: Implementation, dtype: torch.dtype, seed: int, batch: Batch, page: int
) -> None:
    """The same keys and values without the gap, in pages of their own."""
    with_gaps = batch.draw(page=page, dtype=dtype)
    lens = [n - (end - begin) for n, (begin, end) in zip(batch.lens, batch.gaps, strict=True)]
    without = Batch(batch.rows, lens, [(0, 0)] * len(lens)).draw(page=page, dtype=dtype)

    def draw(generator: Generator) -> Case:
        a, closed = with_gaps(generator).arguments, without(generator).arguments
        closed["q"] = a["q"]
        for b in range(len(lens)):
            _, k, v, _ = dense(floats(a), b)
            slots = torch.arange(lens[b])
            where = closed["block_table"][b][slots // page].long(), slots % page
            closed["k_pages"][where] = torch.from_numpy(k).to(dtype)
            closed["v_pages"][where] = torch.from_numpy(v).to(dtype)
        return Case(closed, truth=lambda _: [paged_attention_ref(**widened(a))])

    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds, batch=batches())
def test_a_gap_behind_the_slots_is_none(implementation: Implementation, seed: int, batch: Batch) -> None:
    """While a prefix is fed, its gap lies where nothing is written yet."""
    open_end = Batch(batch.rows, batch.lens, [(n, n + 5) for n in batch.lens]).case(seed).arguments
    none = open_end | {"gaps": torch.zeros_like(open_end["gaps"])}
    assert torch.equal(implementation(**open_end), implementation(**none))


@given(seed=seeds, batch=batches(), factor=st.sampled_from([1.0, 1e4]))
def test_equal_values_come_out(
    implementation: Implementation, seed: int, batch: Batch, factor: float
) -> None:
    """The weights of a row add up to 1, however large the scores are."""
    a = batch.case(seed).arguments
    value = torch.randn(16, generator=seeded(seed))
    a["v_pages"] = torch.where(a["v_pages"].isnan(), torch.nan, value)
    a["q"] = a["q"] * factor
    out = implementation(**a)
    assert_near(value.expand(out.shape), "paged_attention", a)
    assert_near(out, "paged_attention", a)


@given(seed=seeds, batch=batches())
def test_heads_of_a_group_see_the_same_keys(implementation: Implementation, seed: int, batch: Batch) -> None:
    a = batch.case(seed, heads=6, kv_heads=2).arguments
    a["q"] = a["q"][:, ::3].repeat_interleave(3, dim=1)
    out = implementation(**a).unflatten(1, (2, 3))
    assert torch.equal(out, out[:, :, :1].expand(out.shape))


@every_dtype
@pytest.mark.parametrize("place", ["q", "k_pages", "v_pages"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@given(seed=seeds, batch=batches(least=2, least_rows=1))
def test_what_is_not_finite_stays_in_its_sequence(
    implementation: Implementation, dtype: torch.dtype, place: str, poison: float, seed: int, batch: Batch
) -> None:
    """A slot spoils its own sequence, from the row on that sees it; a query spoils its own row."""
    a = batch.case(seed, dtype=dtype).arguments
    dirty = copied(a)
    if place == "q":
        dirty["q"][0] = poison
        spoilt = torch.arange(len(a["q"])) == 0
    else:
        page, offset = divmod(batch.lens[0] - 1, a["k_pages"].shape[1])
        dirty[place][int(a["block_table"][0, page]), offset] = poison
        spoilt = torch.arange(len(a["q"])) < batch.rows[0]
    clean, out = implementation(**a), implementation(**dirty)
    assert torch.equal(bits(out[~spoilt]), bits(clean[~spoilt]))
    last = 0 if place == "q" else batch.rows[0] - 1
    if poison != poison or place != "k_pages":  # a key of +-Inf may score -Inf, which is weight 0
        assert not out[last].isfinite().any()


def even(dims: dict[str, int]) -> dict[str, int]:
    """Heads that can be rotated."""
    return dims | {"head_width": dims["head_width"] + dims["head_width"] % 2}


@every_dtype
@given(seed=seeds, batch=batches(), repeat=repeats, dims=dims.map(even))
def test_scaled_pages(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    batch: Batch,
    repeat: int,
    dims: dict[str, int],
) -> None:
    """Float8 pages without the K bias, at positions of up to 35 hours; poison as in plain ones."""
    draw = batch.draw(heads=repeat * dims["kv_heads"], dtype=dtype, scaled=True, **dims)
    if why := implementation.refusal(draw(seeded(seed)).arguments):
        pytest.skip(why)
    assert_right(implementation, draw(seeded(seed)), draw)


def restored(a: Arguments) -> Arguments:
    """The same call on plain float64 pages: slot by slot the scale is undone and the turned bias added. The
    position of a slot is counted down from the sequence's first row, slot by slot that is not in the gap.
    """
    wide = widened(a)
    scale, bias = wide.pop("kv_scale"), wide.pop("bias")
    positions, inv_freq = wide.pop("positions"), wide.pop("inv_freq")
    groups, width = a["k_pages"].shape[2:]
    own = bias[-2 * groups * width : -groups * width].view(1, groups, width)
    k, v = (wide[name] * scale[i][:, None] for i, name in enumerate(("k_pages", "v_pages")))
    page = k.shape[1]
    for b, length in enumerate(a["kv_lens"].tolist()):
        first, last = a["row_starts"][b : b + 2].tolist()
        if first == last:
            continue
        begin, end = a["gaps"][b].tolist()
        position = int(positions[last - 1])
        for slot in reversed(range(length)):
            if begin <= slot < end:
                continue
            where = int(a["block_table"][b, slot // page]), slot % page
            k[where] += rotate(own, torch.tensor([position]), inv_freq)[0]
            position -= 1
    return wide | {"k_pages": k, "v_pages": v}


@given(seed=seeds, batch=batches(most=3), page=st.sampled_from([1, 3, 8, 64]))
def test_the_definition_of_scaled_pages(seed: int, batch: Batch, page: int) -> None:
    case = batch.case(seed, heads=4, kv_heads=2, head_width=6, page=page, scaled=True)
    ours = paged_attention_ref(**widened(case.arguments))
    theirs = paged_attention_ref(**restored(case.arguments))
    assert relative_error(ours, theirs) <= 1e-9  # positions of 2^22 times 2^-52


def written_then_read(bias: Tensor, seed: int, kind: str) -> Tensor:
    """Attention of the last of 60 rows [1, 4, 32] over what rope_append stored of all: "exact" float64 pages,
    "plain" float8 ones with the bias in them, "scaled" ones without.
    """
    g = seeded(seed)
    qkv, slots = torch.randn(60, 8 * 32, generator=g), torch.arange(60)
    inv_freq = 1e6 ** (-torch.arange(16, dtype=torch.float64) / 16)
    dtype = torch.float64 if kind == "exact" else torch.float32
    k, v = (torch.zeros(1, 64, 2, 32, dtype=dtype if kind == "exact" else FLOAT8) for _ in range(2))
    scale = torch.full((2, 2), 2.0**-5) if kind == "scaled" else None
    q = rope_append_ref(qkv.to(dtype), bias.to(dtype), slots + 1000, slots, inv_freq, k, v, scale)[-1:]
    last = [torch.tensor(x, dtype=torch.int32) for x in ([[0]], [0, 1], [60], [[0, 0]])]
    extras = () if scale is None else (scale, bias, slots[-1:] + 1000, inv_freq)
    return paged_attention_ref(q, k, v, *last, *extras)


@given(seed=seeds)
def test_a_huge_bias_of_keys_costs_scaled_pages_nothing(seed: int) -> None:
    """As Qwen2.5 has it: 100 in a pair of channels. In the pages it would drown what the keys say."""
    none = torch.zeros(8 * 32)
    huge = none.clone()
    huge[4 * 32 : 6 * 32].view(2, 2, 16)[:, :, 13] = 100.0
    errors = {
        kind: relative_error(written_then_read(bias, seed, kind), written_then_read(bias, seed, "exact"))
        for kind, bias in (("scaled", huge), ("plain", huge))
    }
    base = relative_error(written_then_read(none, seed, "scaled"), written_then_read(none, seed, "exact"))
    assert errors["scaled"] <= 3 * base and errors["plain"] > 2 * errors["scaled"]


def test_what_scaled_pages_need_goes_together() -> None:
    a = Batch([2], [5], [(0, 0)]).case(1, scaled=True).arguments
    for name in ("kv_scale", "bias", "positions", "inv_freq"):
        with pytest.raises(ValueError, match=f"go together; missing: {name}"):
            paged_attention_ref(**a | {name: None})
    with pytest.raises(TypeError, match=r"k_pages must be torch.float8_e4m3fn, got torch.float32"):
        paged_attention_ref(**a | {"k_pages": a["k_pages"].float(), "v_pages": a["v_pages"].float()})
    with pytest.raises(ValueError, match=r"bias is \[64\], .* need \[128\] and \[8\]"):
        paged_attention_ref(**a | {"bias": a["bias"][:64]})
    with pytest.raises(ValueError, match=r"dimension N of positions is 3"):
        paged_attention_ref(**a | {"positions": torch.zeros(3, dtype=torch.int64)})


def test_who_has_no_scaled_pages_says_so() -> None:
    """By name, before anything runs: none takes the call and leaves the scales out."""
    a = Batch([2], [5], [(0, 0)]).case(1, scaled=True, dtype=torch.bfloat16).arguments
    takes = {"reference", "torch", "graph", "triton"}
    for backend in REGISTRY["paged_attention"].implementations:
        refusal = REGISTRY["paged_attention"].refusal(backend, (), a)
        assert bool(refusal) == (backend not in takes), (backend, refusal)


@pytest.mark.parametrize("backend", ["reference", "graph"])
def test_calls_with_scaled_pages_are_traced(backend: str) -> None:
    """torch's own check of the fake; its other ones compute with pages, which it cannot in float8."""
    arguments = paged_attention_case(seeded(2), scaled=True).arguments
    with use_backend(f"paged_attention={backend}"):
        torch.library.opcheck(
            REGISTRY["paged_attention"].torch_op, (), arguments, test_utils="test_faketensor"
        )
