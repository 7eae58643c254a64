"""layer_norm in Triton against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.testing.op_cases import Case, layer_norm_case

Check = Callable[[str, Case], None]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 64), (3, 127), (20, 1280)])
def test_equals_the_definition(check: Check, rows: int, width: int, dtype: torch.dtype) -> None:
    check("layer_norm", layer_norm_case(generator(rows), rows=rows, width=width, dtype=dtype))


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_mean_far_from_zero(check: Check, offset: float) -> None:
    check("layer_norm", layer_norm_case(generator(), rows=4, width=300, offset=offset))
