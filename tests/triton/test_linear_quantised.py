"""linear_quantised in Triton against its definition: every format and epilogue, ragged sizes, split depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastloop.ops.linear import EPILOGUES
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, linear_quantised_case
from fastloop.triton_kernels.launch import record_launches
from fastloop.triton_kernels.linear_quantised import linear_quantised_triton

Check = Callable[[str, Case], None]
KINDS = ("int8", "fp8", "int4", "int4-64")


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(check: Check, kind: str, epilogue: str, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"rows": 13, "width_in": 192, "width_out": 70, "bias": True, "residual": True}
    case = linear_quantised_case(seeded(1), kind=kind, epilogue=epilogue, dtype=dtype, **sizes)
    check("linear_quantised", case)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(1, 1, 1), (17, 67, 130), (65, 200, 33)])
def test_any_size(check: Check, kind: str, rows: int, width_in: int, width_out: int) -> None:
    sizes: dict[str, Any] = {"rows": rows, "width_in": width_in, "width_out": width_out}
    check("linear_quantised", linear_quantised_case(seeded(rows), kind=kind, **sizes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_split_depth(check: Check, kind: str, epilogue: str) -> None:
    """Deep and narrow: the depth is split, and the second kernel adds, scales and finishes."""
    case = linear_quantised_case(
        seeded(2), kind=kind, rows=5, width_in=1344, width_out=34, bias=True, epilogue=epilogue
    )
    with record_launches() as launches:
        linear_quantised_triton(**case.arguments)
    assert [launch.kernel.__name__ for launch in launches] == ["_linear", "_add_splits"]
    check("linear_quantised", case)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(device: str, kind: str) -> None:
    case = linear_quantised_case(seeded(3), kind=kind, rows=13, width_in=192, width_out=40)
    run = Implementation("linear_quantised", "triton", device)
    clean = run(**case.arguments)
    case.arguments["x"][4, 77] = torch.nan
    spoilt = run(**case.arguments)
    others = torch.arange(13) != 4
    assert spoilt[4].isnan().all() and torch.equal(spoilt[others], clean[others])


def test_a_channel_of_zeros(device: str) -> None:
    """Its scale is 0, so its output is the bias."""
    case = linear_quantised_case(seeded(4), kind="fp8", bias=True)
    case.arguments["values"][5] = 0
    case.arguments["scale"][5] = 0
    out = Implementation("linear_quantised", "triton", device)(**case.arguments)
    assert torch.equal(out[:, 5], case.arguments["bias"][5].expand(13))
