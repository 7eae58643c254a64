"""linear in Triton against its definition: every epilogue, ragged sizes, split depth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.ops.linear import EPILOGUES
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, linear_case
from fastloop.triton_kernels.launch import record_launches
from fastloop.triton_kernels.linear import depth_splits, linear_triton, prefetched
from fastloop.triton_kernels.tuning import overridden

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(check: Check, epilogue: str, extras: bool, dtype: torch.dtype) -> None:
    sizes = {"rows": 13, "width_in": 200, "width_out": 70}
    case = linear_case(generator(), **sizes, bias=extras, residual=extras, epilogue=epilogue, dtype=dtype)
    check("linear", case)


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize(("width_in", "width_out"), [(1, 1), (67, 130)])
def test_any_number_of_rows(check: Check, rows: int, width_in: int, width_out: int) -> None:
    case = linear_case(
        generator(rows), rows=rows, width_in=width_in, width_out=width_out, bias=True, residual=True
    )
    check("linear", case)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_split_depth(check: Check, epilogue: str) -> None:
    """Deep and narrow: the depth is split, and the second kernel adds and finishes."""
    case = linear_case(
        generator(), rows=5, width_in=1300, width_out=34, bias=True, residual=True, epilogue=epilogue
    )
    with record_launches() as launches:
        linear_triton(**case.arguments)
    assert [launch.kernel.__name__ for launch in launches] == ["_linear", "_add_splits"]
    check("linear", case)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("channels", [5, 13])
def test_tiles_of_fewer_channels_than_their_block(check: Check, epilogue: str, channels: int) -> None:
    blocks = {"BLOCK_OUT": 16, "BLOCK_ROWS": 16, "BLOCK_DEPTH": 32, "warps": 4, "stages": 2}
    case = linear_case(
        generator(), rows=13, width_in=300, width_out=70, bias=True, residual=True, epilogue=epilogue
    )
    with overridden("linear", {**blocks, "channels": channels, "max_splits": 4, "prefetch_kb": 16}):
        check("linear", case)


def test_what_is_asked_for_ahead() -> None:
    """Kilobytes of a program as columns of its rows, in whole lines of 128 bytes; 0 where that is less."""
    weight = torch.empty(64, 2048, dtype=torch.bfloat16)
    assert prefetched(64, weight, 32, gate=False) == 1024 and prefetched(64, weight, 32, gate=True) == 512
    assert prefetched(16, weight.to(torch.float8_e4m3fn), 32, gate=True) == 256
    assert prefetched(0, weight, 32, gate=False) == 0 == prefetched(4, weight, 64, gate=False)


def test_no_rows(device: str) -> None:
    x, weight = torch.empty(0, 32, device=device), torch.ones(8, 32, device=device)
    assert linear_triton(x, weight).shape == (0, 8)


def test_rows_do_not_see_each_other(device: str) -> None:
    """A NaN stays in its row; a row is bit-equal whatever the others of its tile hold."""
    case = linear_case(generator(3), rows=13, width_in=300, width_out=40)
    run = Implementation("linear", "triton", device)
    clean = run(**case.arguments)
    case.arguments["x"][4, 77] = torch.nan
    spoilt = run(**case.arguments)
    others = torch.arange(13) != 4
    assert spoilt[4].isnan().all()
    assert torch.equal(spoilt[others], clean[others])


def test_strided_rows(device: str) -> None:
    case = linear_case(generator(4), rows=7, width_in=64, width_out=32, residual=True)
    wide = torch.full((7, 100), torch.nan)
    wide[:, 20:84] = case.arguments["x"]
    run = Implementation("linear", "triton", device)
    assert torch.equal(run(**case.arguments | {"x": wide[:, 20:84]}), run(**case.arguments))


@pytest.mark.parametrize(
    ("tiles", "steps", "expected"),
    [(344, 16, 1), (32, 86, 9), (32, 16, 4), (264, 100, 1), (1, 3, 1), (1, 1000, 16)],
)
def test_depth_splits(tiles: int, steps: int, expected: int) -> None:
    assert depth_splits(tiles, steps, processors=132, most=16) == expected
