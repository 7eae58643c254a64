"""rope_append: a text token, a listening step, and 64 of them; hot rows, and pages that are only written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastloop.config import ModelConfig
from fastloop.ops.rope_append import rope_append_bytes
from fastloop.testing.assertions import seeded
from fastloop.testing.implementations import Implementation
from fastloop.testing.op_cases import rope_append_case

PAGE = 64


@pytest.mark.parametrize("rows", [1, 13, 832])
def test_rope_append(
    clock: Callable[..., None],
    implementation: Implementation,
    config: ModelConfig,
    dtype: torch.dtype,
    rows: int,
) -> None:
    d = config.decoder
    dims = {"heads": d.heads, "kv_heads": d.kv_heads, "head_width": d.head_width}
    case = rope_append_case(seeded(0), rows=rows, page=PAGE, padded=0, dtype=dtype, **dims)
    clock(implementation, case, rope_append_bytes(rows, d.heads, d.kv_heads, d.head_width, dtype.itemsize))
