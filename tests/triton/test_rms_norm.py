"""rms_norm in Triton against its definition, with and without the fused residual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import Case, rms_norm_case

Check = Callable[[str, Case], None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 64), (3, 127), (13, 2048)])
def test_equals_the_definition(
    check: Check, rows: int, width: int, residual: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(width)
    check("rms_norm", rms_norm_case(g, rows=rows, width=width, residual=residual, dtype=dtype))


def test_a_sum_of_zero_is_zero(device: str) -> None:
    """Rounded by hand where the interpreter cuts bits off, it was a subnormal number."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    residual = -x
    y = Implementation("rms_norm", "triton", device)(
        x=x, weight=torch.ones_like(x[0]), eps=1e-6, residual=residual
    )
    assert not residual.any() and not y.any()


def test_a_residual_whose_rows_are_not_contiguous_is_refused(device: str) -> None:
    arguments = rms_norm_case(torch.Generator().manual_seed(1), residual=True).arguments
    arguments["residual"] = arguments["residual"].T.contiguous().T
    with pytest.raises(ValueError, match="residual is changed in place and must be contiguous"):
        Implementation("rms_norm", "triton", device)(**arguments)
