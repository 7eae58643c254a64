"""rope_append in Triton against its definition: far positions, padded rows, pages of another dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.ops.rope_append import rotate
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
