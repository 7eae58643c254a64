"""The op `rope_append`: every implementation against the definition, the definition against transformers."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from fastloop.ops import REGISTRY, use_backend
from fastloop.ops.rope_append import rope_append_ref, rotate, to_float8
from fastloop.quantise import FP8_MOST
from fastloop.testing.assertions import assert_defined, assert_near, assert_right, bits, seeded
from fastloop.testing.implementations import Implementation, copied
from fastloop.testing.op_cases import Arguments, Case, rope_append_case

seeds = st.integers(0, 2**32 - 1)
rows = st.sampled_from([1, 2, 13, 33, 64])
groups = st.integers(1, 3)
repeats = st.sampled_from([1, 2, 7, 8])
head_widths = st.one_of(st.sampled_from([64, 128]), st.integers(1, 20).map(lambda half: 2 * half))
pages = st.sampled_from([1, 3, 8, 64])
sizes = {
    "seed": seeds,
    "rows": rows,
    "groups": groups,
    "repeat": repeats,
    "head_width": head_widths,
    "page": pages,
    "bias": st.booleans(),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@every_dtype
@given(**sizes, padded=st.integers(0, 3))
def test_errs_at_most_twice_as_much_as_torch(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    groups: int,
    repeat: int,
    head_width: int,
    page: int,
    bias: bool,
    padded: int,
) -> None:
    """At positions of up to 35 hours. Slots that are not written stay the NaN they were."""

    def draw(generator: torch.Generator) -> Case:
        return rope_append_case(
            generator,
            rows=rows,
            heads=groups * repeat,
            kv_heads=groups,
            head_width=head_width,
            page=page,
            bias=bias,
            padded=padded,
            dtype=dtype,
        )

    assert_right(implementation, draw(seeded(seed)), draw)


@given(seed=seeds, rows=rows)
def test_pages_of_another_dtype(implementation: Implementation, seed: int, rows: int) -> None:
    case = rope_append_case(seeded(seed), rows=rows, page_dtype=torch.bfloat16)
    assert_right(implementation, case)


def parts(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, K], k and v [N, G, K] of a call, before the rotation."""
    width, kv_heads = a["k_pages"].shape[3], a["k_pages"].shape[2]
    x = a["qkv"] if a["bias"] is None else a["qkv"] + a["bias"]
    q, k, v = x.unflatten(1, (-1, width)).tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    return q, k, v


def stored(a: Arguments, k: Tensor, v: Tensor) -> list[Tensor]:
    """The pages once k and v [N, G, K] are in their slots."""
    pools = []
    for pool, new in ((a["k_pages"], k), (a["v_pages"], v)):
        flat = pool.clone().flatten(0, 1)
        for slot, row in zip(a["slots"].tolist(), new, strict=True):
            if slot >= 0:
                flat[slot] = row.to(flat.dtype)
        pools.append(flat.view(pool.shape))
    return pools


def with_transformers(**a: Tensor) -> list[Tensor]:
    """Qwen2's own function, in float64."""
    q, k, v = parts(a)
    angle = a["positions"].double()[:, None] * a["inv_freq"].repeat(2)
    q, k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    return [q, *stored(a, k, v)]


def with_complex_numbers(**a: Tensor) -> list[Tensor]:
    """Halves as real and imaginary parts, times exp(i angle)."""
    q, k, v = parts(a)
    turn = np.exp(1j * np.outer(a["positions"].numpy(), a["inv_freq"].numpy()))[:, None]
    turned = []
    for x in (q, k):
        low, high = np.split(x.numpy(), 2, axis=-1)
        y = (low + 1j * high) * turn
        turned.append(torch.from_numpy(np.concatenate((y.real, y.imag), axis=-1)))
    return [turned[0], *stored(a, turned[1], v)]


@pytest.mark.parametrize("formula", [with_transformers, with_complex_numbers])
@given(seed=seeds, rows=rows, groups=groups, head_width=head_widths, bias=st.booleans())
def test_definition(formula: object, seed: int, rows: int, groups: int, head_width: int, bias: bool) -> None:
    case = rope_append_case(
        seeded(seed), rows=rows, heads=2 * groups, kv_heads=groups, head_width=head_width, bias=bias
    )
    assert_defined("rope_append", case, formula)


@every_dtype
@given(seed=seeds, rows=rows, bias=st.booleans())
def test_position_zero_turns_nothing(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int, bias: bool
) -> None:
    """To the bit: what is stored and returned is qkv + bias, rounded once."""
    a = rope_append_case(seeded(seed), rows=rows, bias=bias, dtype=dtype).arguments
    a["positions"] = torch.zeros_like(a["positions"])
    q, k, v = parts(a)
    pools = stored(a, k, v)
    assert torch.equal(implementation(**a), q)
    assert torch.equal(bits(a["k_pages"]), bits(pools[0])) and torch.equal(bits(a["v_pages"]), bits(pools[1]))


@every_dtype
@given(seed=seeds, rows=rows)
def test_values_are_stored_as_they_are(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int
) -> None:
    """v is not rotated, wherever the row is; slots of nobody keep their bits."""
    a = rope_append_case(seeded(seed), rows=rows, dtype=dtype).arguments
    pools = stored(a, *parts(a)[1:])
    implementation(**a)
    assert torch.equal(bits(a["v_pages"]), bits(pools[1]))
    assert torch.equal(a["k_pages"].isnan(), pools[0].isnan())


@given(seed=seeds, rows=rows, first=st.integers(0, 2**20), second=st.integers(0, 2**20))
def test_rotations_compose(
    implementation: Implementation, seed: int, rows: int, first: int, second: int
) -> None:
    """Turning what was turned by `first` once more by `second` is turning by their sum."""
    a = rope_append_case(seeded(seed), rows=rows, bias=False).arguments
    at = {n: {"positions": torch.full((rows,), n)} for n in (first, second, first + second)}
    once = implementation(**copied(a) | at[first])
    again = copied(a) | at[second]
    again["qkv"][:, : once[0].numel()] = once.flatten(1)
    case = rope_append_case(seeded(seed), rows=rows, bias=False).arguments | at[first + second]
    assert_near(implementation(**again), "rope_append", case)


@given(seed=seeds, rows=rows, shift=st.integers(0, 2**21))
def test_scores_see_differences_of_positions_alone(
    implementation: Implementation, seed: int, rows: int, shift: int
) -> None:
    """q . k and the length of each pair stay what they were when all positions move."""

    def turned(move: int) -> tuple[Tensor, Tensor]:
        a = rope_append_case(seeded(seed), rows=rows, heads=1, kv_heads=1, padded=0, most=1000).arguments
        a["positions"] += move
        q = implementation(**a)[:, 0].double()
        return q, a["k_pages"].flatten(0, 2)[a["slots"]].double()

    (q, k), (moved_q, moved_k) = turned(0), turned(shift)
    # cos, a product and a sum are rounded: 3/2 eps a coordinate, 3/2 sqrt(2) < 3 eps a pair; q and k, twice
    bound = 4 * 3 * torch.finfo(torch.float32).eps
    for a, b, c, d in ((q, k, moved_q, moved_k), (q, q, moved_q, moved_q), (k, k, moved_k, moved_k)):
        scale = a.norm(dim=1)[:, None] * b.norm(dim=1)
        assert ((a @ b.T - c @ d.T).abs() <= bound * scale).all()


@every_dtype
@given(seed=seeds, rows=rows)
def test_rows_without_a_slot_store_nothing(
    implementation: Implementation, dtype: torch.dtype, seed: int, rows: int
) -> None:
    """...and are rotated all the same."""
    a = rope_append_case(seeded(seed), rows=rows, padded=rows, dtype=dtype).arguments
    assert (a["slots"] == -1).all()
    q = implementation(**a)
    assert a["k_pages"].isnan().all() and a["v_pages"].isnan().all()
    assert_near(q, "rope_append", a)


@every_dtype
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    implementation: Implementation, dtype: torch.dtype, poison: float
) -> None:
    a = rope_append_case(seeded(1), rows=13, padded=0, dtype=dtype).arguments
    clean, dirty = copied(a), copied(a)
    dirty["qkv"][5] = poison
    before, after = implementation(**clean), implementation(**dirty)
    others, slot = torch.arange(13) != 5, int(a["slots"][5])
    assert torch.equal(bits(after[others]), bits(before[others])) and not after[5].isfinite().any()
    for name in ("k_pages", "v_pages"):
        ours, theirs = dirty[name].flatten(0, 1), clean[name].flatten(0, 1)
        assert not ours[slot].isfinite().any()
        ours[slot] = theirs[slot]
        assert torch.equal(bits(ours), bits(theirs))


@every_dtype
@given(**sizes)
def test_scaled_pages(
    implementation: Implementation,
    dtype: torch.dtype,
    seed: int,
    rows: int,
    groups: int,
    repeat: int,
    head_width: int,
    page: int,
    bias: bool,
) -> None:
    """Float8 pages hold k without its bias and v with it, over their scales: within half a step of E4M3 and
    what the rows' own precision rounds. Slots of nobody keep their NaN.
    """
    dims = {"heads": groups * repeat, "kv_heads": groups, "head_width": head_width, "page": page}
    case = rope_append_case(seeded(seed), rows=rows, bias=bias, dtype=dtype, scaled=True, **dims)
    if why := implementation.refusal(case.arguments):
        pytest.skip(why)
    assert_right(implementation, case)
    a = copied(case.arguments)
    implementation(**a)
    _, bare, _ = (x.double() for x in parts(a | {"bias": None, "qkv": a["qkv"].double()}))
    v = parts(a | {"qkv": a["qkv"].double()})[2].double()
    k = rotate(bare, a["positions"], a["inv_freq"])
    own = torch.finfo(dtype).eps * (1 + (a["bias"].abs().max() if bias else 0))
    for pool, exact, scale in zip((a["k_pages"], a["v_pages"]), (k, v), a["kv_scale"], strict=True):
        real = a["slots"] >= 0
        kept = pool.float().flatten(0, 1)[a["slots"][real]] * scale[:, None]
        half_step = exact[real].abs() / 16 + scale[:, None] * 2.0**-10
        size = exact[real].unflatten(2, (2, -1)).norm(dim=2).repeat(1, 1, 2)  # of what is rotated together
        assert ((kept - exact[real]).abs() <= half_step + 2 * own * (1 + size)).all()
        assert pool.float().isnan().all(-1).all(-1).sum() == pool[..., 0, 0].numel() - real.sum()


@given(seed=seeds, rows=rows, factor=st.sampled_from([0.0, 300.0, torch.inf]))
def test_the_bias_of_keys_stays_out_of_scaled_pages(
    implementation: Implementation, seed: int, rows: int, factor: float
) -> None:
    """To the bit; queries have theirs."""
    a = rope_append_case(seeded(seed), rows=rows, scaled=True).arguments
    if why := implementation.refusal(a):
        pytest.skip(why)
    other = copied(a)
    own = slice(-2 * 2 * 16, -2 * 16)  # the K part
    other["bias"][own] = factor * other["bias"][own].abs()
    q = implementation(**a)
    assert torch.equal(implementation(**other), q)
    for name in ("k_pages", "v_pages"):
        assert torch.equal(bits(a[name]), bits(other[name]))


def test_what_is_too_large_or_not_finite_in_scaled_pages(implementation: Implementation) -> None:
    a = rope_append_case(seeded(1), rows=5, padded=0, scaled=True, bias=False).arguments
    if why := implementation.refusal(a):
        pytest.skip(why)
    a["positions"][:] = 0
    k_part = a["qkv"][:, -64:-32]
    k_part[0], k_part[1], k_part[2, 3], k_part[3] = 1e30, -1e30, torch.inf, torch.nan
    implementation(**a)
    kept = a["k_pages"].float().flatten(0, 1)[a["slots"]]
    assert (kept[0] == FP8_MOST).all() and (kept[1] == -FP8_MOST).all() and kept[3].isnan().all()
    assert kept[2].isnan().sum() == 2  # it and, times sin 0, what is rotated with it
    assert kept[4].isfinite().all()


def test_scales_of_pages_of_another_dtype_are_refused(implementation: Implementation) -> None:
    a = rope_append_case(seeded(1), scaled=True).arguments
    plain = {name: a[name].float() for name in ("k_pages", "v_pages")}
    with pytest.raises(TypeError, match=r"rope_append: k_pages must be torch.float8_e4m3fn"):
        rope_append_ref(**a | plain)
    with pytest.raises(ValueError, match=r"dimension G of kv_scale is 3"):
        rope_append_ref(**a | {"kv_scale": torch.ones(2, 3)})
    with pytest.raises(TypeError, match=r"kv_scale must be torch.float32"):
        rope_append_ref(**a | {"kv_scale": torch.ones(2, 2).double()})
    if not implementation.missing and implementation.backend == "cpu":
        with pytest.raises(TypeError, match="float8"):
            implementation(**a)


@given(seed=seeds, magnitude=st.integers(-8, 8))
def test_float8_rounds_to_nearest(seed: int, magnitude: int) -> None:
    x = 10.0**magnitude * torch.randn(4, 3, 16, generator=seeded(seed))
    scale = x.abs().amax((0, 2)) / FP8_MOST
    kept = to_float8(x, scale).float() * scale[:, None]
    assert ((kept - x).abs() <= x.abs() / 16 * (1 + 1e-6) + scale[:, None] * 2.0**-10).all()


@pytest.mark.parametrize("backend", ["reference", "graph"])
def test_calls_with_scaled_pages_are_traced(backend: str) -> None:
    """torch's own check of the fake; its other ones compute with pages, which it cannot in float8."""
    arguments = rope_append_case(seeded(2), scaled=True).arguments
    with use_backend(f"rope_append={backend}"):
        torch.library.opcheck(REGISTRY["rope_append"].torch_op, (), arguments, test_utils="test_faketensor")
