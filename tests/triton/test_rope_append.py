"""rope_append in Triton against its definition: far positions, padded rows, pages of another dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.ops import REGISTRY
from fastloop.ops.rope_append import rotate
from fastloop.testing.assertions import bits
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, rope_append_case
from fastloop.testing.tolerance import error_bound, relative_error

Check = Callable[[str, Case], None]
FAR = 10_000_000  # positions: 85 hours of sound


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_definition(check: Check, bias: bool, dtype: torch.dtype) -> None:
    check("rope_append", rope_append_case(generator(), rows=9, bias=bias, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_width"), [(1, 1, 2), (7, 1, 6), (6, 3, 96), (16, 2, 128)]
)
def test_any_heads(check: Check, heads: int, kv_heads: int, head_width: int) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width}
    check("rope_append", rope_append_case(generator(), rows=3, **sizes))


@pytest.mark.parametrize("rows", [1, 65])
def test_any_number_of_rows(check: Check, rows: int) -> None:
    check("rope_append", rope_append_case(generator(rows), rows=rows, padded=rows // 3))


@pytest.mark.parametrize("page_dtype", [torch.float32, torch.float16])
def test_pages_of_another_dtype(check: Check, page_dtype: torch.dtype) -> None:
    check("rope_append", rope_append_case(generator(2), dtype=torch.float16, page_dtype=page_dtype))


@pytest.mark.parametrize("start", [0, FAR, 2**40])
def test_far_positions(device: str, start: int) -> None:
    """Neighbouring positions, near and 10 million on, in float32: the angles are those of float64."""
    case = rope_append_case(generator(3), rows=8, heads=2, kv_heads=1, head_width=128, bias=False, padded=0)
    case.arguments["positions"] = torch.arange(start, start + 8)
    run = Implementation("rope_append", "triton", device)
    out = run(**case.arguments)
    x = case.arguments["qkv"].view(8, 4, 128)[:, :2]
    positions, inv_freq = case.arguments["positions"], case.arguments["inv_freq"]
    truth = rotate(x.double(), positions, inv_freq)
    bound = error_bound(rotate(x, positions, inv_freq), truth, torch.float32)
    assert relative_error(out, truth) <= bound
    float32_angles = rotate(x.double(), positions.float().double(), inv_freq.float())
    assert start == 0 or relative_error(float32_angles, truth) > 100 * bound  # what this test would catch


def test_strided_rows(device: str) -> None:
    case = rope_append_case(generator(4), rows=5)
    qkv = case.arguments["qkv"]
    wide = torch.full((5, qkv.shape[1] + 40), torch.nan)
    wide[:, 8:-32] = qkv
    run = Implementation("rope_append", "triton", device)
    pages = {n: case.arguments[n].clone() for n in ("k_pages", "v_pages")}
    expected = run(**case.arguments)
    assert torch.equal(run(**case.arguments | {"qkv": wide[:, 8:-32]} | pages), expected)
    for name, written in pages.items():
        torch.testing.assert_close(written, case.arguments[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_width"), [(1, 1, 2), (7, 1, 6), (6, 3, 96), (16, 2, 128)]
)
def test_scaled_pages(
    check: Check, device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_width: int
) -> None:
    """Nearly every number is the very one that the definition stores: both round the same rows."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_width": head_width}
    case = rope_append_case(generator(), rows=9, padded=2, dtype=dtype, scaled=True, **sizes)
    check("rope_append", case)
    wide = {n: t.float() if n in ("qkv", "bias") else t for n, t in case.arguments.items()}
    pages = [{n: case.arguments[n].clone() for n in ("k_pages", "v_pages")} for _ in range(2)]
    Implementation("rope_append", "triton", device)(**case.arguments | pages[0])
    REGISTRY["rope_append"].reference(**wide | pages[1])
    for name in ("k_pages", "v_pages"):
        same = bits(pages[0][name]) == bits(pages[1][name])
        assert same.float().mean() > 0.99


def test_what_does_not_fit_in_scaled_pages(device: str) -> None:
    """Too large: the largest; not finite: NaN."""
    a = rope_append_case(generator(), rows=4, padded=0, bias=False, scaled=True).arguments
    a["positions"][:] = 0
    for part in (a["qkv"][:, -64:-32], a["qkv"][:, -32:]):
        part[0], part[1], part[2, 5] = 1e30, -1e30, -torch.inf
    Implementation("rope_append", "triton", device)(**a)
    for name in ("k_pages", "v_pages"):
        kept = a[name].float().flatten(0, 1)[a["slots"]]
        assert (kept[0] == 448).all() and (kept[1] == -448).all() and kept[3].isfinite().all()
        assert kept[2].flatten()[5].isnan() and kept[2].isnan().sum() == 1 + (name == "k_pages")


def test_scaled_pages_beside_a_poisoned_row(device: str) -> None:
    a = rope_append_case(generator(5), rows=6, padded=0, scaled=True).arguments
    clean, dirty = (a | {n: a[n].clone() for n in ("k_pages", "v_pages", "qkv")} for _ in range(2))
    dirty["qkv"][2] = torch.nan
    for arguments in (clean, dirty):
        Implementation("rope_append", "triton", device)(**arguments)
    for name in ("k_pages", "v_pages"):
        spoilt, whole = (x[name].flatten(0, 1) for x in (dirty, clean))
        assert spoilt[a["slots"][2]].float().isnan().all()
        others = torch.arange(len(whole)) != a["slots"][2]
        assert torch.equal(bits(spoilt[others]), bits(whole[others]))
